"""From plans to new weights, and plans that keep routing groups equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.grouped import by_group, check_grouping, routing_groups
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import LayerRecord, PlanFile, WeightPlan
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import PlannedRewrite, rewriter
from moekit.compress.prune.dern import DERN
from moekit.compress.prune.frequency import Frequency
from moekit.compress.prune.naee import NAEE
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics
from tests.checkpoints import plain
from tests.families import EXPERTS, HIDDEN, WIDTH, build


def plan(method: str, keeps: dict[int, tuple[int, ...]], load: list[int], **settings: Any) -> WeightPlan:
    """A plan of a model of eight experts, all layers with the same load."""
    values = {"load": torch.tensor(load), "gate_mass": torch.tensor(load).double()}
    layers = {
        n: LayerRecord(
            experts=len(load),
            hidden=HIDDEN,
            width=WIDTH,
            scores=tuple(map(float, load)),
            outcome=LayerOutcome(keep=keep),
        )
        for n, keep in keeps.items()
    }
    file = PlanFile(
        kind="prune", method=method, settings=settings, budget=Budget(keep=4), fingerprint="", layers=layers
    )
    statistics = {n: LayerStatistics(len(load), HIDDEN, (), sum(load), values, width=WIDTH) for n in keeps}
    return WeightPlan(file, statistics)


def rewriting(plan: WeightPlan, checkpoint: Checkpoint, **more: Any) -> PlannedRewrite | None:
    """The rewriting of a plan, as one that was made for this model."""
    file = plan.file.model_copy(update={"fingerprint": checkpoint.fingerprint})
    return rewriter(WeightPlan(file, plan.statistics), checkpoint, **more)


def layer_weights(index: int = 0, family: str = "qwen3_moe") -> LayerWeights:
    layers = {layer.index: layer for layer in find_moe_layers(build(family))}
    return read_block(layers[index]).map(lambda t: t.detach().clone())


LOAD = [8, 7, 6, 5, 4, 3, 2, 1]


def test_methods_that_only_drop_need_no_rewriting(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    assert rewriting(plan("frequency", {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}, LOAD), checkpoint) is None


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_new_weights_are_those_of_the_method(tmp_path: Path, family: str) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family))
    keep = (0, 2, 3, 5)
    settings = {"alpha": -1.0, "compare": "all"}
    told = plan("dern", {0: keep, 1: keep}, LOAD, **settings)
    rewrite = rewriting(told, checkpoint, folder=tmp_path / "kept")
    assert rewrite is not None
    weights = layer_weights(0, family)
    inputs = LayerInputs(0, geometries_of(checkpoint)[0], told.statistics[0])
    expected = DERN(**settings).transform(weights, LayerOutcome(keep=keep), inputs)
    for made in (rewrite(0, weights), rewriting(told, checkpoint, folder=tmp_path / "kept")(0, weights)):  # type: ignore[misc]
        for name in ("gate_EIH", "up_EIH", "down_EHI", "gate_bias_EI", "up_bias_EI", "down_bias_EH"):
            one, two = getattr(made, name), getattr(expected, name)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)
        assert set(made.router) == set(expected.router)
        assert all(torch.equal(made.router[name], expected.router[name]) for name in made.router)
    assert rewrite.figures[0] == DERN(**settings).told(weights, LayerOutcome(keep=keep), inputs)
    assert not torch.equal(expected.up_EIH, weights.select(keep).up_EIH)


def test_finished_layers_are_not_made_again_unless_something_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    calls = []
    real = DERN.transform

    def counted(self: DERN, weights: LayerWeights, *rest: Any) -> LayerWeights:
        calls.append(str(weights.up_EIH.dtype))
        return real(self, weights, *rest)

    monkeypatch.setattr(DERN, "transform", counted)
    weights, keeps = layer_weights(), {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
    for _ in range(2):
        rewrite = rewriting(plan("dern", keeps, LOAD, alpha=0.0), checkpoint, folder=tmp_path / "kept")
        assert rewrite is not None
        rewrite(0, weights)
    assert calls == ["torch.float32"]
    # Another precision, other knobs, another outcome: all are other work.
    rewrite(0, weights.map(lambda t: t.bfloat16()))
    for other in (plan("dern", keeps, LOAD, alpha=0.1), plan("dern", {0: (0, 1, 2, 4), 1: (0,)}, LOAD, alpha=0.0)):
        again = rewriting(other, checkpoint, folder=tmp_path / "kept")
        assert again is not None
        again(0, weights)
    assert calls == ["torch.float32", "torch.bfloat16", "torch.float32", "torch.float32"]


def test_layers_that_keep_all_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    monkeypatch.setattr(DERN, "transform", lambda *_: pytest.fail("nothing was dropped"))
    rewrite = rewriting(plan("dern", dict.fromkeys((0, 1), tuple(range(EXPERTS))), LOAD), checkpoint)
    assert rewrite is not None
    weights = layer_weights()
    assert torch.equal(rewrite(0, weights).down_EHI, weights.down_EHI)


def test_the_best_of_each_group_stay(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "glm4_moe"))
    assert routing_groups(checkpoint.config) == 2
    assert routing_groups({}) == 1
    geometries = geometries_of(checkpoint)
    # Two groups of four; by load alone the first group would keep all of them.
    told = plan("frequency", dict.fromkeys(geometries, (0, 1, 2, 3)), [90, 80, 70, 60, 10, 20, 0, 40])
    found = by_group(told, geometries, 2)
    assert {layer.outcome.keep for layer in found.values()} == {(0, 1, 5, 7)}
    # Protected ones before all, ties to the lower number, never routed ones last.
    file = told.file.model_copy(update={"protected": dict.fromkeys(geometries, (3,))})
    found = by_group(WeightPlan(file, told.statistics), geometries, 2)
    assert {layer.outcome.keep for layer in found.values()} == {(0, 3, 5, 7)}
    file = told.file.model_copy(update={"protected": dict.fromkeys(geometries, (1, 2, 3))})
    with pytest.raises(BadConfig, match="3 experts of routing group 0 are protected, but 2"):
        by_group(WeightPlan(file, told.statistics), geometries, 2)


@pytest.mark.parametrize(
    ("method", "keep", "words"),
    [
        (Frequency(), 5, "5 experts are not equally many in 2.*\n.*keep 4 or 6"),
        (Frequency(), 1, "1 experts are not equally many in 2.*\n.*keep 2"),
        (NAEE(), 4, "in its own way"),
        (DERN(), 4, "in its own way"),
    ],
)
def test_what_cannot_keep_groups_equal(method: PruneMethod, keep: int, words: str) -> None:
    check_grouping(Frequency(), "frequency", {0: 4}, 2)
    with pytest.raises(BadConfig, match=words):
        check_grouping(method, "it", {0: keep}, 2)
