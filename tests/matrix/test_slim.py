"""Every method that narrows experts on every family: in memory, and from disk to disk, split and fused.

A method of another package joins by being registered: its `examples` are tried here without a line of test code.
"""

from __future__ import annotations

import copy
import dataclasses
import json
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
from moekit.checkpoint.spec import stated
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.making import make_layers
from moekit.compress.engine.narrowing import SlimMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.weights import LayerWeights
from moekit.trace import Trace, record
from tests.checkpoints import plain, reopen
from tests.contracts import cases, drawn
from tests.families import EXPERTS, HIDDEN, VOCAB, WIDTH, build, logits, tokens

METHODS = [record.name for record in catalogue.methods("slim")]
NARROW = WIDTH // 2
TEXT = [tokens(4, 24, seed=21), tokens(2, 9, seed=22)]
_KEPT = TemporaryDirectory()


@cache
def checkpoint(family: str, fused: bool = False) -> Checkpoint:
    """A family's tiny checkpoint, written once; read-only."""
    return Checkpoint.open(plain(Path(_KEPT.name) / f"{family}-{fused}", family, fused=fused))


def examples(name: str, model: PreTrainedModel) -> list[SlimMethod]:
    cls: type[SlimMethod] = catalogue.get("slim", name).cls
    return list(cls.examples(find_moe_layers(model)[0].geometry))


@cache
def trace(family: str, fused: bool, needs: tuple[str, ...]) -> Trace:
    """Of the whole model: some scores are gradients."""
    return record(build(family), TEXT, statistics=needs, fingerprint=checkpoint(family, fused).fingerprint)


def plan_of(family: str, method: SlimMethod, width: int, *, fused: bool = False) -> WeightPlan:
    source = trace(family, fused, method.required) if method.required else None
    plan = plan_weights(checkpoint(family, fused), source, PlanRequest(method, WidthBudget(width=width)))
    return make_layers(checkpoint(family, fused), CalibrationText(TEXT), [plan])[0]


@pytest.mark.parametrize(("name", "family", "fused"), cases(METHODS, [False, True]))
def test_a_narrow_folder_is_the_narrow_model(name: str, family: str, fused: bool, tmp_path: Path) -> None:
    model, method, source = build(family), examples(name, build(family))[0], checkpoint(family, fused)
    plan = plan_of(family, method, NARROW, fused=fused)
    narrow = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, source))
    record_ = Record(command="a test")
    apply(source, plan.outcomes, tmp_path / "out", rewrite=rewriter(plan, source), record=record_)
    opened = reopen(tmp_path / "out", catalogue.get("slim", name))
    memory = narrow.state_dict()
    assert all(torch.equal(value, memory[key]) for key, value in opened.state_dict().items())
    torch.testing.assert_close(logits(opened), logits(narrow), rtol=1e-4, atol=1e-5)  # buffers may lie unaligned
    assert {layer.geometry.width for layer in find_moe_layers(opened)} == {NARROW}
    assert {layer.geometry.shared_width for layer in find_moe_layers(opened)} == {
        layer.geometry.shared_width for layer in find_moe_layers(model)
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = stated(config, "width")
    assert told is not None
    assert told[1] == NARROW
    before = model.state_dict()
    for key, value in opened.state_dict().items():
        if ".experts." not in key or "shared" in key:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(("name", "family"), [(name, drawn(name)) for name in METHODS])
def test_unrepaired_it_is_the_masked_model_and_whole_it_is_the_model(name: str, family: str, tmp_path: Path) -> None:
    model, source = build(family), checkpoint(family)
    method = next(m for m in examples(name, model) if m.repair == "none")
    plan = plan_of(family, method, NARROW)
    narrow = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, source))
    torch.testing.assert_close(logits(narrow), logits(masked(model, narrow)), rtol=1e-6, atol=1e-6)
    plan.save(tmp_path / "p.json")
    stored = WeightPlan.load(tmp_path / "p.json", "slim")
    assert (stored.method, stored.hash) == (method, plan.hash)
    again = change_model(copy.deepcopy(model), stored.outcomes, rewriter(stored, source))
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in narrow.state_dict().items())
    kept = plan_of(family, examples(name, model)[0], WIDTH)
    same = change_model(copy.deepcopy(model), kept.outcomes, rewriter(kept, source))
    assert all(torch.equal(t, same.state_dict()[key]) for key, t in model.state_dict().items())


def masked(model: PreTrainedModel, narrow: PreTrainedModel) -> PreTrainedModel:
    """The model with the down columns of all neurons that are not in the narrow one set to zero."""
    made = copy.deepcopy(model)
    after = {layer.index: read_block(layer) for layer in find_moe_layers(narrow)}

    def mask(layer: int, weights: LayerWeights) -> LayerWeights:
        down_EHI = weights.down_EHI.clone()
        for e in range(weights.experts):
            stays = [any(torch.equal(row, kept) for kept in after[layer].up_EIH[e]) for row in weights.up_EIH[e]]
            assert sum(stays) == NARROW
            down_EHI[e, :, [k for k, stay in enumerate(stays) if not stay]] = 0
        return dataclasses.replace(weights, down_EHI=down_EHI)

    outcomes = {layer.index: LayerOutcome(keep=tuple(range(EXPERTS))) for layer in find_moe_layers(model)}
    return change_model(made, outcomes, mask)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_narrows_to_the_sizes_that_the_formula_says(name: str) -> None:
    model = build("qwen3_moe")
    heads, pairs, head_dim, layers = 4, 2, 8, 2
    attention = 2 * HIDDEN * heads * head_dim + 2 * HIDDEN * pairs * head_dim
    norms = layers * (2 * HIDDEN + 2 * head_dim) + HIDDEN
    wanted = layers * (attention + EXPERTS * 3 * HIDDEN * NARROW + EXPERTS * HIDDEN) + 2 * VOCAB * HIDDEN + norms
    for method in examples(name, model):
        plan = plan_of("qwen3_moe", method, NARROW)
        narrow = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, checkpoint("qwen3_moe")))
        assert sum(parameter.numel() for parameter in narrow.parameters()) == wanted
