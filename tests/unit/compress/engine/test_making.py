"""Weights that are made where a text stands at a layer: what they are, and how little is kept on the way."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine.making import make_layers, remembering
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.slim.magnitude import Magnitude
from moekit.compress.slim.random import Random
from moekit.compress.slim.slimmoe import SlimMoE
from moekit.errors import BadConfig
from moekit.trace.expert_inputs import ExpertInputs
from moekit.trace.streamed import Streamed
from tests.checkpoints import plain
from tests.families import EXPERTS, WIDTH, build, tokens

FAMILY, NARROW, RIDGE = "qwen3_moe", 8, 0.01
IDS = tokens(6, 40, seed=3)
TEXT = CalibrationText([IDS])
BUDGET = WidthBudget(width=NARROW)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(plain(tmp_path_factory.mktemp("made") / "m", FAMILY, fused=True))


def planned(checkpoint: Checkpoint) -> list[WeightPlan]:
    methods = (SlimMoE(score="output-norm", ridge=RIDGE), Magnitude(ridge=RIDGE), Random(ridge=RIDGE))
    return [plan_weights(checkpoint, TEXT, PlanRequest(method, BUDGET)) for method in methods]


def test_down_projections_are_those_of_a_plain_solve_over_all_tokens(checkpoint: Checkpoint) -> None:
    model = build(FAMILY)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    layers = find_moe_layers(model)
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda m, args, n=layer.index: seen.update({n: args}))
    with torch.no_grad():
        model(IDS)
    plan = make_layers(checkpoint, TEXT, planned(checkpoint))[1]
    rewrite = rewriter(plan, checkpoint)
    assert rewrite is not None
    for layer in layers:
        weights, (x_TH, index_TK, gate_TK) = read_block(layer), seen[layer.index]
        made = rewrite(layer.index, weights)
        assert weights.gate_EIH is not None
        for e in range(EXPERTS):
            up, gate, down = (t.double() for t in (weights.up_EIH[e], weights.gate_EIH[e], weights.down_EHI[e]))
            scores = up.norm(dim=1) * down.norm(dim=0)
            kept = sorted(scores.argsort(descending=True)[:NARROW].tolist())
            rows, slots = (index_TK == e).nonzero(as_tuple=True)
            x, w = x_TH[rows].double(), gate_TK[rows, slots].double()[:, None]
            h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            # Least squares on rows, with the ridge as further rows: no second moment is formed.
            lam = RIDGE * float(((w * h[:, kept]) ** 2).sum() / NARROW)
            left = torch.cat([w * h[:, kept], lam**0.5 * torch.eye(NARROW).double()])
            right = torch.cat([w * (h @ down.T), lam**0.5 * down[:, kept].T])
            wanted = torch.linalg.lstsq(left, right).solution.T if len(rows) else down[:, kept]
            torch.testing.assert_close(made.down_EHI[e].double(), wanted, rtol=1e-3, atol=1e-5)
            assert torch.equal(made.up_EIH[e], weights.up_EIH[e][kept])


def test_of_all_plans_moments_of_one_layer_are_there_at_a_time_and_none_is_stored(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[int, list[weakref.ref[Tensor]]] = {}
    asked, walks = list[tuple[int, int]](), list[object]()
    read, walk = ExpertInputs.gated_moment, Streamed.run

    def gated(inputs: ExpertInputs, expert: int) -> Tensor:
        assert inputs._moe is not None
        layer = inputs._moe.index
        others = [ref for n, refs in alive.items() if n != layer for ref in refs]
        assert all(ref() is None for ref in others), "moments of another layer are still there"
        asked.append((layer, expert))
        found = read(inputs, expert)
        alive.setdefault(layer, []).append(weakref.ref(found))
        return found

    def run(streamed: Streamed, *given: object) -> None:
        walks.append(streamed)
        walk(streamed, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertInputs, "gated_moment", gated)
    plans = planned(checkpoint)
    monkeypatch.setattr(Streamed, "run", run)
    made = make_layers(checkpoint, TEXT, plans)
    assert len(walks) == 1
    assert len(asked) == len(set(asked)) == 2 * EXPERTS, "each moment is made once for all plans and figures"
    assert all(ref() is None for refs in alive.values() for ref in refs)
    for number, plan in enumerate(made):
        stored = sum(t.numel() for statistics in plan.statistics.values() for t in statistics.values())
        assert stored <= 2 * EXPERTS * (WIDTH + 1)
        plan.save(tmp_path / f"{number}.json")
        again = WeightPlan.load(tmp_path / f"{number}.json", "slim")
        assert again.hash == plan.hash
        (again,) = make_layers(checkpoint, TEXT, [again])
        assert again.file.made == plan.file.made
    with pytest.raises(BadConfig, match="made as the text passes by"):
        WeightPlan.load(tmp_path / "0.json", "slim").made_layers()


def test_plans_that_need_no_text_come_back_as_they_are(checkpoint: Checkpoint) -> None:
    bare = plan_weights(checkpoint, None, PlanRequest(Magnitude(repair="none"), BUDGET))
    whole = plan_weights(checkpoint, TEXT, PlanRequest(Magnitude(), WidthBudget(width=WIDTH)))
    assert make_layers(checkpoint, TEXT, [bare, whole]) == [bare, whole]


def test_what_is_too_large_to_be_remembered_is_read_again() -> None:
    read: list[int] = []

    def moment(expert: int) -> Tensor:
        read.append(expert)
        return torch.zeros(2, 2, dtype=torch.float64)

    once = remembering(moment, limit=40)
    assert all(torch.equal(once(e), torch.zeros(2, 2).double()) for e in (0, 1, 0, 1))
    assert read == [0, 1, 1]
