"""REAM layer after layer, against a loop that runs the whole model again for each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import cosine_similarity, silu
from transformers import PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.live import change_model
from moekit.compress.engine.measuring import refuse_damaged
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.merge.ream import REAM
from moekit.compress.weights import LayerWeights
from moekit.trace import record
from moekit.trace.streamed import Streamed
from tests.checkpoints import plain
from tests.families import EXPERTS, HIDDEN, WIDTH, build, tokens

BATCHES: list[Any] = [tokens(3, 20, seed=5), tokens(2, 9, seed=6)]


@torch.no_grad()
def merged_by_hand(
    model: PreTrainedModel, keep: int, align: str = "both"
) -> tuple[PreTrainedModel, dict[int, LayerOutcome]]:
    found: dict[int, LayerOutcome] = {}
    for number in range(model.config.num_hidden_layers):
        block = cast(Any, model).model.layers[number].mlp
        seen: list[Any] = []
        hook = block.experts.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args))
        for batch in BATCHES:
            model(input_ids=batch, use_cache=False)
        hook.remove()
        x_NH, index_NK, gate_NK = (torch.cat([args[n].flatten(0, -2) for args in seen]) for n in range(3))
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        made, inner = [], []
        for e in range(EXPERTS):
            gate, up = gate_up[e][:WIDTH], gate_up[e][WIDTH:]
            inner.append(silu(x_NH @ gate.T) * (x_NH @ up.T))
            made.append(inner[e] @ down[e].T)
        saliency = []
        for e in range(EXPERTS):
            mine = [(gate_NK[n, k] * made[e][n].norm()).item() for n, k in (index_NK == e).nonzero().tolist()]
            saliency.append(sum(mine) / len(mine) if mine else 0.0)
        z_NE = (x_NH @ block.gate.weight.T).double()
        z_NE = z_NE / z_NE.norm(dim=0)
        apart = [[float((z_NE[:, e] - z_NE[:, f]).norm()) for f in range(EXPERTS)] for e in range(EXPERTS)]
        farthest = max(map(max, apart))
        distance = [
            [
                1 - (1 - apart[e][f] / farthest + float((cosine_similarity(made[e], made[f]).mean() + 1) / 2)) / 2
                for f in range(EXPERTS)
            ]
            for e in range(EXPERTS)
        ]
        assert all(s > 0 for s in saliency), "every expert is chosen here"
        order = sorted(range(EXPERTS), key=lambda e: -saliency[e])
        free, groups = set(order[keep:]), {}
        for c in order[:keep]:
            near = sorted(free, key=lambda e: distance[c][e])[:2]
            free -= set(near)
            groups[c] = sorted([c, *near])
        keeps = tuple(sorted(groups))
        worth = [[saliency[e] for e in groups[c]] for c in keeps]
        shares = tuple(tuple(w / sum(own) for w in own) for own in worth)
        found[number] = LayerOutcome(keep=keeps, sources=tuple(tuple(groups[c]) for c in keeps), shares=shares)
        whole = {
            layer.index: LayerOutcome(keep=tuple(range(layer.geometry.experts))) for layer in find_moe_layers(model)
        }
        change_model(
            model,
            whole | {number: found[number]},
            lambda at, weights, number=number, inner=inner: (
                averaged(weights, found[number], inner, align) if at == number else weights
            ),
        )
    return model, found


def averaged(weights: LayerWeights, outcome: LayerOutcome, inner: list[torch.Tensor], align: str) -> LayerWeights:
    result = weights.select(outcome.keep)
    gates, ups, downs = weights.gate_EIH, weights.up_EIH, weights.down_EHI
    assert gates is not None
    assert outcome.sources is not None
    assert outcome.shares is not None
    for position, (c, group, share) in enumerate(zip(outcome.keep, outcome.sources, outcome.shares, strict=True)):
        sums = [torch.zeros(WIDTH, HIDDEN), torch.zeros(WIDTH, HIDDEN), torch.zeros(HIDDEN, WIDTH)]
        for e, s in zip(group, share, strict=True):
            rows_c, rows_e = (torch.cat([gates[n], ups[n], downs[n].T], dim=1) for n in (c, e))
            rows_c, rows_e = rows_c / rows_c.norm(dim=1, keepdim=True), rows_e / rows_e.norm(dim=1, keepdim=True)
            apart = (rows_c[:, None] - rows_e).norm(dim=-1)
            given_c, given_e = (inner[n].T / inner[n].T.norm(dim=1, keepdim=True) for n in (c, e))
            together = (given_c[:, None] - given_e).norm(dim=-1)
            apart = {"weights": apart, "activations": together, "both": apart + together}[align]
            columns = linear_sum_assignment(apart.numpy())[1]
            for total, value in zip(sums, (gates[e][columns], ups[e][columns], downs[e][:, columns]), strict=True):
                total += s * value
        for stack, total in zip((result.gate_EIH, result.up_EIH, result.down_EHI), sums, strict=True):
            assert stack is not None
            stack[position] = total
    return result


def made_of(plan: WeightPlan, checkpoint: Checkpoint, model: PreTrainedModel) -> PreTrainedModel:
    return change_model(model, plan.outcomes, rewriter(plan, checkpoint))


@pytest.mark.parametrize(
    "align", ["auto", "weights", pytest.param("activations", marks=[pytest.mark.full, pytest.mark.slow])]
)
def test_each_layer_is_decided_behind_the_merged_layers_before_it(align: str, tmp_path: Path) -> None:
    model = build("qwen3_moe", num_hidden_layers=3)
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe", num_hidden_layers=3))
    request = PlanRequest(REAM(group_size=3, align=cast(Any, align)), Budget(keep=4))
    plan = plan_weights(checkpoint, CalibrationText(BATCHES), request)
    plan.save(tmp_path / "plan.json")
    plan = WeightPlan.load(tmp_path / "plan.json")  # with the order of neurons, for which there is no second text
    expected, outcomes = merged_by_hand(copy.deepcopy(model), 4, "both" if align == "auto" else align)
    for number, outcome in outcomes.items():
        found = plan.outcomes[number]
        assert (found.keep, found.sources) == (outcome.keep, outcome.sources), number
        for share, wanted in zip(found.shares or (), outcome.shares or (), strict=True):
            assert share == pytest.approx(wanted, rel=1e-3)
    made = made_of(plan, checkpoint, copy.deepcopy(model))
    for ours, theirs in zip(find_moe_layers(made), find_moe_layers(expected), strict=True):
        torch.testing.assert_close(ours.experts.gate_up_proj, theirs.experts.gate_up_proj, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours.experts.down_proj, theirs.experts.down_proj, rtol=1e-3, atol=1e-5)
    at_once = plan_weights(
        checkpoint, CalibrationText(BATCHES), PlanRequest(REAM(group_size=3, mode="layerwise"), Budget(keep=4))
    )
    assert at_once.outcomes[0] == plan.outcomes[0]
    assert at_once.outcomes[2] != plan.outcomes[2], "the merged layers before must matter here"


def test_the_text_passes_as_seldom_as_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, ran = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe")), list[bool]()
    own = Streamed.run
    monkeypatch.setattr(Streamed, "run", lambda self, *a: (ran.append(a[1] is not refuse_damaged), own(self, *a))[1])
    uniform, shared = Budget(keep=4), Budget(keep=4, scope="global")
    for method, budget, passes in (
        (REAM(), uniform, [True]),
        (REAM(), shared, [False, True]),
        (REAM(mode="layerwise"), shared, [False]),
    ):
        ran.clear()
        plan = plan_weights(checkpoint, CalibrationText(BATCHES), PlanRequest(method, budget))
        assert ran == passes
        assert sum(outcome.experts for outcome in plan.outcomes.values()) == 8


def test_a_layer_that_keeps_all_gives_up_routing_groups_as_it_will_where_it_is_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "deepseek_v3", num_hidden_layers=4))
    every = tuple(range(EXPERTS))
    request = PlanRequest(REAM(), Budget(keep=6, scope="global"), protected={1: every})
    plan = plan_weights(checkpoint, CalibrationText(BATCHES), request)
    assert plan.outcomes[1].experts == EXPERTS > plan.outcomes[2].experts
    # The model as it is written, but for the last layer, which is measured before anything becomes of it.
    made, outcomes = rewriter(plan, checkpoint), {**plan.outcomes, 3: LayerOutcome(keep=every)}
    assert made is not None
    model = change_model(
        build("deepseek_v3", num_hidden_layers=4), outcomes, lambda n, w: made(n, w) if n == 2 else w.select(every)
    )
    behind = record(model, BATCHES, statistics=("logit_gram",)).require(("logit_gram",))
    torch.testing.assert_close(plan.statistics[3]["logit_gram"], behind[3]["logit_gram"], rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.slow
def test_fewer_choices_reach_the_layers_behind(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    one, two = (
        plan_weights(checkpoint, CalibrationText(BATCHES), PlanRequest(REAM(), Budget(keep=4), top_k=k))
        for k in (1, None)
    )
    assert one.outcomes[0] == two.outcomes[0]
    assert one.statistics[1]["logit_gram"].tolist() != two.statistics[1]["logit_gram"].tolist()
