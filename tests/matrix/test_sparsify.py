"""Every method that zeroes single weights on every family: in memory, and from disk to disk, split and fused.

A method of another package joins by being registered: its `examples` are tried here without a line of test code.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.plan import WeightPlan, budget_as
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.engine.zeroing import SparsifyMethod
from moekit.compress.maths.masks import zeros_in
from tests.checkpoints import plain, reopen
from tests.contracts import cases
from tests.families import EXPERTS, HIDDEN, WIDTH, build, logits, tokens

METHODS = [record.name for record in catalogue.methods("sparsify")]
TEXT = CalibrationText([tokens(4, 24, seed=21), tokens(2, 9, seed=22)])
# Weights of the smallest comparison of any method: a row of the down projection.
FEWEST = min(HIDDEN, WIDTH)

_FOLDERS: dict[tuple[str, bool], Checkpoint] = {}


@pytest.fixture
def checkpoint(family: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A family's tiny checkpoint, written once; read-only."""
    fused = bool(request.node.callspec.params.get("fused", False))
    if (family, fused) not in _FOLDERS:
        folder = plain(tmp_path_factory.mktemp(family) / "m", family, fused=fused)
        _FOLDERS[family, fused] = Checkpoint.open(folder)
    return _FOLDERS[family, fused]


def examples(name: str, model: PreTrainedModel) -> list[SparsifyMethod]:
    cls: type[SparsifyMethod] = catalogue.get("sparsify", name).cls
    return list(cls.examples(find_moe_layers(model)[0].geometry))


def plan_of(checkpoint: Checkpoint, method: SparsifyMethod, sparsity: float) -> WeightPlan:
    share = sparsity if method.fixed_sparsity is None else method.fixed_sparsity
    return plan_weights(
        checkpoint, TEXT if method.required else None, PlanRequest(method, SparsityBudget(sparsity=share))
    )


def matrices(model: PreTrainedModel) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, part) -> weights [E, R, C] of the experts."""
    found = {}
    for layer in find_moe_layers(model):
        weights = read_block(layer)
        parts = {"gate": weights.gate_EIH, "up": weights.up_EIH, "down": weights.down_EHI}
        found |= {(layer.index, part): t for part, t in parts.items() if t is not None}
    return found


@pytest.mark.parametrize(("name", "family"), cases(METHODS))
def test_no_zeros_change_no_bit(name: str, family: str, checkpoint: Checkpoint) -> None:
    model = build(family)
    stock = logits(model)
    for method in examples(name, model):
        if method.fixed_sparsity is not None:
            continue
        plan = plan_of(checkpoint, method, 0.0)
        changed = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, checkpoint))
        assert torch.equal(logits(changed), stock), repr(method)


@pytest.mark.parametrize(("name", "family", "fused"), cases(METHODS, [False, True]))
def test_a_sparse_folder_is_the_sparse_model(
    name: str, family: str, fused: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model, method = build(family), examples(name, build(family))[0]
    plan = plan_of(checkpoint, method, 0.6)
    changed = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, checkpoint))
    zeros, target = rewriter(plan, checkpoint), tmp_path / "out"
    record = Record(command="a test")
    apply(checkpoint, plan.outcomes, target, rewrite=zeros, record=record, mtp="keep")
    opened = reopen(target, catalogue.get("sparsify", name))
    memory = changed.state_dict()
    assert all(torch.equal(value, memory[key]) for key, value in opened.state_dict().items())
    torch.testing.assert_close(logits(opened), logits(changed), rtol=1e-4, atol=1e-5)  # buffers may lie unaligned
    assert not torch.equal(logits(opened), logits(model))
    _check_zeros(matrices(opened), matrices(model), plan, zeros.count.zeros)
    before = dict(model.state_dict())
    for key, value in opened.state_dict().items():
        if not key.endswith(("gate_up_proj", "up_proj", "down_proj")) or "shared" in key or ".experts." not in key:
            assert torch.equal(value, before[key]), key


def _check_zeros(
    after: dict[tuple[int, str], Any], before: dict[tuple[int, str], Any], plan: WeightPlan, told: int
) -> None:
    counted = 0
    for (layer, part), found in after.items():
        experts, rows, columns = found.shape
        share, zero = plan.file.layers[layer].outcome.sparsity or 0.0, found == 0
        assert torch.equal(found[~zero], before[layer, part][~zero]), "what is left is what it was"
        assert (before[layer, part] != 0).all()
        # Where rows are compared each row has as many zeros; where matrices are, each matrix.
        by_row, by_matrix = zeros_in(columns, share), zeros_in(rows * columns, share)
        assert bool((zero.sum(-1) == by_row).all()) or bool((zero.sum((1, 2)) == by_matrix).all())
        counted += int(zero.sum())
        assert experts == EXPERTS
    total = sum(found.numel() for found in after.values())
    assert counted == told
    assert counted / total == pytest.approx(budget_as(SparsityBudget, plan.file.budget).sparsity, abs=1 / FEWEST)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), cases(METHODS))
def test_every_setting_gives_its_zeros_and_a_stored_plan_the_same(
    name: str, family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = build(family)
    for number, method in enumerate(examples(name, model)):
        plan = plan_of(checkpoint, method, 0.5)
        plan.save(tmp_path / f"{number}.json")
        stored = WeightPlan.load(tmp_path / f"{number}.json")
        read = stored.file.model_copy(update={"statistics_sha256": ""})  # filled in as it is written
        assert (read, stored.hash) == (plan.file, plan.hash)
        assert stored.method == method
        zeros, again = rewriter(plan, checkpoint), rewriter(stored, checkpoint)
        for layer in find_moe_layers(model):
            weights = read_block(layer)
            made, same = zeros(layer.index, weights), again(layer.index, weights)
            assert torch.equal(made.down_EHI, same.down_EHI)
            assert torch.equal(made.up_EIH, same.up_EIH)
        assert zeros.count.sparsity == pytest.approx(0.5, abs=1 / FEWEST), repr(method)
