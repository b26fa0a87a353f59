"""What methods that change weights promise: of the seed, of what stays, and of how much is left."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.catalogue import MethodRecord, Trait
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.bits import BitBudget
from moekit.compress.budget.sizes import Budget
from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.live import change_model
from moekit.compress.engine.making import make_layers
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.narrowing import SlimMethod
from moekit.compress.engine.outcome import PARTS
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.quantizing import QuantizeMethod
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.engine.searching import plan_by_search
from moekit.compress.engine.zeroing import FIELDS, SparsifyMethod
from moekit.compress.weights import LayerWeights
from moekit.trace import Trace, record as record_whole
from moekit.trace.streamed import Streamed, record_streamed
from tests.checkpoints import plain
from tests.families import build, tokens

KINDS = ("prune", "merge", "sparsify", "quantize", "slim")
FAMILY = "qwen3_moe"
TEXT: list[Any] = [tokens(4, 24, seed=21), tokens(2, 9, seed=22)]
KEEP = 5
_KEPT = TemporaryDirectory()


def of(*having: Trait, without: tuple[Trait, ...] = ()) -> list[Any]:
    """Registered methods with some traits, and without others."""
    found = [record for kind in KINDS for record in catalogue.methods(kind)]
    return [
        pytest.param(record, id=f"{record.kind}-{record.name}")
        for record in found
        if record.traits.issuperset(having) and not record.traits & set(without)
    ]


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(plain(Path(_KEPT.name) / "m", FAMILY, fused=True))


@cache
def trace(needs: tuple[str, ...]) -> Trace:
    return record_streamed(checkpoint(), TEXT, statistics=("load", *needs))


def examples(record: MethodRecord) -> list[WeightMethod[Any, Any]]:
    return list(record.cls.examples(find_moe_layers(build(FAMILY))[0].geometry))


@cache
def changed(record: MethodRecord, seed: int = 0, number: int = 0) -> tuple[WeightPlan, dict[int, LayerWeights]]:
    """What a method plans and makes of a tiny model."""
    method = examples(record)[number]
    if isinstance(method, SparsifyMethod):
        share = 0.5 if method.fixed_sparsity is None else method.fixed_sparsity
        text = CalibrationText(TEXT) if method.required else None
        plan = plan_weights(checkpoint(), text, PlanRequest(method, SparsityBudget(sparsity=share), seed=seed))
    elif isinstance(method, QuantizeMethod):
        text = CalibrationText(TEXT) if method.required else None
        budget = BitBudget(bits=dict.fromkeys(PARTS, 3))
        plan = plan_weights(checkpoint(), text, PlanRequest(method, budget, seed=seed))
    elif isinstance(method, SlimMethod):
        # Of the whole model: some scores are gradients.
        needs, known = method.required, checkpoint().fingerprint
        measured = record_whole(build(FAMILY), TEXT, statistics=needs, fingerprint=known) if needs else None
        plan = plan_weights(checkpoint(), measured, PlanRequest(method, WidthBudget(width=KEEP), seed=seed))
        (plan,) = make_layers(checkpoint(), CalibrationText(TEXT), [plan])
    elif method.searches:
        request = PlanRequest(method, Budget(keep=KEEP), seed=seed)
        with Streamed(checkpoint(), TEXT, statistics=("load",)) as streamed:
            plan = plan_by_search(checkpoint(), trace(method.required), streamed, request)
    else:
        request = PlanRequest(method, Budget(keep=KEEP), seed=seed)
        source = CalibrationText(TEXT) if method.sequential else trace(method.required)
        plan = plan_weights(checkpoint(), source, request)
    model = change_model(copy.deepcopy(build(FAMILY)), plan.outcomes, rewriter(plan, checkpoint()))
    return plan, {layer.index: read_block(layer) for layer in find_moe_layers(model)}


@cache
def before() -> dict[int, LayerWeights]:
    return {layer.index: read_block(layer) for layer in find_moe_layers(build(FAMILY))}


def stacks(weights: LayerWeights) -> dict[str, Tensor]:
    """Matrices of all experts of a layer, [E, R, C] each."""
    return {name: stack for name in FIELDS.values() if (stack := getattr(weights, name)) is not None}


def alike(one: dict[int, LayerWeights], two: dict[int, LayerWeights]) -> bool:
    pairs = [(stacks(one[layer]), stacks(two[layer])) for layer in one]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def numbers(layers: dict[int, LayerWeights]) -> int:
    """Weights of all experts, those that are zero too."""
    return sum(stack.numel() for weights in layers.values() for stack in stacks(weights).values())


@pytest.mark.parametrize("record", of(without=("stochastic",)))
def test_the_seed_changes_nothing(record: MethodRecord) -> None:
    (one, first), (two, second) = changed(record, 0), changed(record, 1)
    assert one.outcomes == two.outcomes
    assert alike(first, second), "a method that draws at random declares stochastic"


@pytest.mark.parametrize("record", of("stochastic"))
def test_equal_seeds_give_equal_results_and_something_is_drawn(
    record: MethodRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other seeds need not give another result: clusters of several starts may be the same."""
    asked: list[str] = []
    stock = LayerInputs.generator

    def generator(inputs: LayerInputs, purpose: str = "") -> torch.Generator:
        asked.append(purpose)
        return stock(inputs, purpose)

    monkeypatch.setattr(LayerInputs, "generator", generator)
    for number in range(len(examples(record))):
        (one, first), (two, second) = (changed.__wrapped__(record, 3, number) for _ in range(2))
        assert one.outcomes == two.outcomes
        assert alike(first, second)
        if asked:
            return
    raise AssertionError("nothing is drawn")


@pytest.mark.parametrize("record", of(without=("rewrites",)))
def test_experts_that_stay_are_what_they_were(record: MethodRecord) -> None:
    plan, after = changed(record)
    for layer, weights in after.items():
        kept = list(plan.outcomes[layer].keep)
        for name, stack in stacks(weights).items():
            assert torch.equal(stack, stacks(before()[layer])[name][kept]), (layer, name)


@pytest.mark.parametrize("record", of("rewrites"))
def test_experts_that_stay_are_changed_by_some_setting(record: MethodRecord) -> None:
    def rewrites(number: int) -> bool:
        plan, after = changed(record, number=number)
        kept = {layer: list(plan.outcomes[layer].keep) for layer in after}
        return any(
            not torch.equal(stack, stacks(before()[layer])[name][kept[layer]])
            for layer, weights in after.items()
            for name, stack in stacks(weights).items()
            if len(stack) == len(kept[layer])
        )

    assert any(rewrites(number) for number in range(len(examples(record))))


@pytest.mark.parametrize("record", of("narrows"))
def test_fewer_weights_are_left(record: MethodRecord) -> None:
    assert numbers(changed(record)[1]) < numbers(before())


@pytest.mark.parametrize("record", of(without=("narrows", "grows")))
def test_as_many_weights_are_left(record: MethodRecord) -> None:
    after = changed(record)[1]
    assert {layer: {n: t.shape for n, t in stacks(w).items()} for layer, w in after.items()} == {
        layer: {n: t.shape for n, t in stacks(w).items()} for layer, w in before().items()
    }
