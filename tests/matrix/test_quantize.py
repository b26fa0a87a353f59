"""Every method that rounds weights on every family: in memory, and from disk to disk, split and fused.

A method of another package joins by being registered: its `examples` are tried here without a line of test code.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import PreTrainedModel

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.bits import BitBudget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import PARTS
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.quantizing import QuantizeMethod
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from tests.checkpoints import plain, reopen
from tests.contracts import cases
from tests.families import build, logits, tokens

METHODS = [record.name for record in catalogue.methods("quantize")]
TEXT = CalibrationText([tokens(4, 24, seed=21), tokens(2, 9, seed=22)])
_KEPT = TemporaryDirectory()


@cache
def checkpoint(family: str, fused: bool = False) -> Checkpoint:
    """A family's tiny checkpoint, written once; read-only."""
    return Checkpoint.open(plain(Path(_KEPT.name) / f"{family}-{fused}", family, fused=fused))


def examples(name: str, model: PreTrainedModel) -> list[QuantizeMethod]:
    cls: type[QuantizeMethod] = catalogue.get("quantize", name).cls
    return list(cls.examples(find_moe_layers(model)[0].geometry))


def plan_of(source: Checkpoint, method: QuantizeMethod, bits: int) -> WeightPlan:
    budget = BitBudget(bits=dict.fromkeys(PARTS, bits))
    return plan_weights(source, TEXT if method.required else None, PlanRequest(method, budget))


def matrices(model: PreTrainedModel) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, part) -> weights [E, R, C] of the experts."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for layer in find_moe_layers(model):
        weights = read_block(layer)
        parts = {"gate": weights.gate_EIH, "up": weights.up_EIH, "down": weights.down_EHI}
        found |= {(layer.index, part): t for part, t in parts.items() if t is not None}
    return found


def check_values(model: PreTrainedModel, method: QuantizeMethod, bits: int) -> None:
    """A row has no more values in a group than so many bits can tell apart."""
    for (layer, part), stack in matrices(model).items():
        columns = stack.shape[2]
        for row in stack.reshape(-1, columns)[::7]:
            for group in row.split(method.group or columns):
                assert len(group.unique()) <= 2**bits, (layer, part)


@pytest.mark.parametrize(("name", "family", "fused"), cases(METHODS, [False, True]))
def test_a_rounded_folder_is_the_rounded_model(name: str, family: str, fused: bool, tmp_path: Path) -> None:
    model, method, source = build(family), examples(name, build(family))[0], checkpoint(family, fused)
    plan = plan_of(source, method, 2)
    changed = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, source))
    apply(
        source,
        plan.outcomes,
        tmp_path / "out",
        rewrite=rewriter(plan, source),
        record=Record(command="a test"),
        mtp="keep",
    )
    opened = reopen(tmp_path / "out", catalogue.get("quantize", name))
    memory, before = changed.state_dict(), model.state_dict()
    assert all(torch.equal(value, memory[key]) for key, value in opened.state_dict().items())
    torch.testing.assert_close(logits(opened), logits(changed), rtol=1e-4, atol=1e-5)  # buffers may lie unaligned
    assert not torch.equal(logits(opened), logits(model))
    check_values(opened, method, 2)
    for key, value in opened.state_dict().items():
        if not key.endswith(("gate_up_proj", "up_proj", "down_proj")) or "shared" in key or ".experts." not in key:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(("name", "family"), cases(METHODS))
def test_more_bits_are_nearer_for_every_expert_and_a_stored_plan_makes_the_same(
    name: str, family: str, tmp_path: Path
) -> None:
    model, source = build(family), checkpoint(family)
    before, errors = matrices(model), []
    first = examples(name, model)[0]
    for bits in (2, 5):
        plan = plan_of(source, first, bits)
        changed = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, source))
        errors.append({key: (t - before[key]).flatten(1).norm(dim=1) for key, t in matrices(changed).items()})
    assert all(bool((errors[1][key] < errors[0][key]).all()) for key in before)
    plan.save(tmp_path / "p.json")
    stored = WeightPlan.load(tmp_path / "p.json", "quantize")
    assert (stored.method, stored.hash) == (first, plan.hash)
    if first.reads_moments:
        with pytest.raises(BadConfig, match="made as the text passes by"):
            rewriter(stored, source)(min(before)[0], LayerWeights(torch.zeros(1), torch.zeros(1)))  # type: ignore[misc]
        stored = plan_of(source, stored.method, 5)
        assert stored.hash == plan.hash
    again = change_model(copy.deepcopy(model), stored.outcomes, rewriter(stored, source))
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in changed.state_dict().items())


@pytest.mark.parametrize(("name", "family"), cases(METHODS))
def test_experts_of_different_widths_on_disk_are_those_in_memory(name: str, family: str, tmp_path: Path) -> None:
    model, method, source = build(family), examples(name, build(family))[0], checkpoint(family)
    geometries = {layer.index: layer.geometry for layer in find_moe_layers(model)}
    widths = {n: tuple((1, 2, 3, 4)[(e + n) % 4] for e in range(g.experts)) for n, g in geometries.items()}
    budget = BitBudget(mean=2.5, choices=(1, 2, 3, 4), share={"use": "random"}, widths=widths)
    plan = plan_weights(source, TEXT if method.required else None, PlanRequest(method, budget))
    rewrite = rewriter(plan, source)
    changed = change_model(copy.deepcopy(model), plan.outcomes, rewrite)
    record = Record(command="a test")
    apply(source, plan.outcomes, tmp_path / "out", rewrite=rewrite, record=record, mtp="keep")
    opened = reopen(tmp_path / "out", catalogue.get("quantize", name))
    assert all(torch.equal(value, changed.state_dict()[key]) for key, value in opened.state_dict().items())
    torch.testing.assert_close(logits(opened), logits(changed), rtol=1e-4, atol=1e-5)
    before = matrices(model)
    for (layer, part), stack in matrices(opened).items():
        gaps = (stack - before[layer, part]).flatten(1).norm(dim=1) / before[layer, part].flatten(1).norm(dim=1)
        mean = [float(gaps[[e for e, n in enumerate(widths[layer]) if n == bits]].mean()) for bits in (1, 2, 3, 4)]
        assert mean == sorted(mean, reverse=True), (layer, part)
        for expert, bits in enumerate(widths[layer]):
            groups = stack[expert][0].split(method.group or stack.shape[2])
            assert all(len(group.unique()) <= 2**bits for group in groups), (layer, part, expert)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_rounds(name: str) -> None:
    model, source = build("qwen3_moe"), checkpoint("qwen3_moe")
    for method in examples(name, model):
        plan = plan_of(source, method, 3)
        changed = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, source))
        check_values(changed, method, 3)
