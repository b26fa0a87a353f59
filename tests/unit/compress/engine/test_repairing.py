"""Experts that stay, refitted to what their layer gave: against one joint solve, and what it promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from moekit.anatomy import MoELayer, find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.live import change_model
from moekit.compress.engine.making import make_layers
from moekit.compress.engine.plan import WeightPlan, make_method
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.repairing import BlockRepair
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.errors import BadConfig
from moekit.trace.streamed import record_streamed
from tests.checkpoints import plain
from tests.families import EXPERTS, HIDDEN, WIDTH, build, tokens

FAMILY, KEEP = "qwen3_moe", 5
IDS = tokens(10, 60, seed=3)
TEXT = CalibrationText([IDS[:6], IDS[6:]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(plain(tmp_path_factory.mktemp("made") / "m", FAMILY, fused=True))


def planned(
    checkpoint: Checkpoint, repair: BlockRepair | None, kind: str = "prune", name: str = "frequency"
) -> WeightPlan:
    method = make_method(kind, name, {})
    trace = record_streamed(checkpoint, TEXT.batches, statistics=("load", *method.required))
    request = PlanRequest(method, Budget(keep=KEEP), repair=repair)
    return make_layers(checkpoint, TEXT, [plan_weights(checkpoint, trace, request)])[0]


def figures(checkpoint: Checkpoint, plan: WeightPlan) -> dict[int, dict[str, float]]:
    rewrite = rewriter(plan, checkpoint)
    assert rewrite is not None
    for layer in find_moe_layers(build(FAMILY)):
        rewrite(layer.index, read_block(layer))
    return rewrite.figures


def seen_by(model: torch.nn.Module, layer: MoELayer) -> tuple[Tensor, Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = layer.experts.register_forward_pre_hook(lambda module, args: found.append(args))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    x, index, gate = found[0]
    return x.double(), index, gate.double()


def inner(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    weights = read_block(layer)
    assert weights.gate_EIH is not None
    return torch.nn.functional.silu(x @ weights.gate_EIH[expert].double().T) * (x @ weights.up_EIH[expert].double().T)


def test_swept_often_it_is_the_joint_solution(checkpoint: Checkpoint) -> None:
    ridge = 0.1
    plan = planned(checkpoint, BlockRepair(ridge=ridge, sweeps=80))
    rewrite = rewriter(plan, checkpoint)
    assert rewrite is not None
    model = build(FAMILY)
    for layer in find_moe_layers(model):
        weights, kept = read_block(layer), list(plan.outcomes[layer.index].keep)
        x, index, gate = seen_by(model, layer)
        wanted = torch.zeros(len(x), HIDDEN).double()
        for e in range(EXPERTS):
            rows, slots = (index == e).nonzero(as_tuple=True)
            wanted[rows] += gate[rows, slots][:, None] * (inner(layer, e, x[rows]) @ weights.down_EHI[e].double().T)
        scores = (x @ weights.router_EH[kept].double().T).softmax(-1).topk(index.shape[1])
        new_gate = scores.values / (scores.values.sum(1, keepdim=True) if model.config.norm_topk_prob else 1)
        features = torch.zeros(len(x), KEEP * WIDTH).double()
        for j, e in enumerate(kept):
            rows, slots = (scores.indices == j).nonzero(as_tuple=True)
            features[rows, j * WIDTH : (j + 1) * WIDTH] = new_gate[rows, slots][:, None] * inner(layer, e, x[rows])
        # One solve for all experts at once, its ridge as further rows.
        lam = ridge * features.square().sum(0).view(KEEP, WIDTH).mean(1).repeat_interleave(WIDTH)
        start = torch.cat([weights.down_EHI[e].double().T for e in kept])
        left, right = torch.cat([features, lam.sqrt().diag()]), torch.cat([wanted, lam.sqrt()[:, None] * start])
        solved = torch.linalg.lstsq(left, right).solution
        made = rewrite(layer.index, weights)
        found = torch.cat([made.down_EHI[j].double().T for j in range(KEEP)])
        torch.testing.assert_close(found, solved, rtol=1e-3, atol=1e-4)
        told = rewrite.figures[layer.index]
        for name, matrix in (("unrepaired", start), ("repaired", solved)):
            error = float((features @ matrix - wanted).norm() / wanted.norm())
            assert told[name] == pytest.approx(error, rel=1e-4)
        assert torch.equal(made.up_EIH, weights.up_EIH[kept])
        assert torch.equal(made.router_EH, weights.router_EH[kept])


def test_the_error_falls_with_sweeps_and_an_endless_ridge_leaves_the_weights(checkpoint: Checkpoint) -> None:
    told = [figures(checkpoint, planned(checkpoint, BlockRepair(ridge=0.01, sweeps=n))) for n in (1, 2, 5)]
    for layer in told[0]:
        errors = [each[layer]["repaired"] for each in told]
        assert told[0][layer]["unrepaired"] > errors[0] >= errors[1] >= errors[2]
    ridges = [figures(checkpoint, planned(checkpoint, BlockRepair(ridge=r))) for r in (1e-3, 1e-1, 10.0)]
    for layer in told[0]:
        errors = [each[layer]["repaired"] for each in ridges]
        assert errors[0] <= errors[1] <= errors[2] <= ridges[0][layer]["unrepaired"]
    plan = planned(checkpoint, BlockRepair(ridge=1e12))
    rewrite = rewriter(plan, checkpoint)
    assert rewrite is not None
    for block in find_moe_layers(build(FAMILY)):
        weights = read_block(block)
        made = rewrite(block.index, weights)
        torch.testing.assert_close(made.down_EHI, weights.down_EHI[list(plan.outcomes[block.index].keep)])


@pytest.mark.parametrize(("kind", "name"), [("prune", "frequency"), ("merge", "m-smoe")])
def test_the_first_layer_of_a_live_model_is_as_near_as_is_told(checkpoint: Checkpoint, kind: str, name: str) -> None:
    errors = {}
    for repair in (None, BlockRepair()):
        plan = planned(checkpoint, repair, kind, name)
        rewrite = rewriter(plan, checkpoint)
        outputs = []
        for model in (build(FAMILY), change_model(copy.deepcopy(build(FAMILY)), plan.outcomes, rewrite)):
            layer, kept = find_moe_layers(model)[0], list[Tensor]()
            handle = layer.block.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
            with torch.no_grad():
                model(IDS)
            handle.remove()
            outputs.append((kept[0][0] if isinstance(kept[0], tuple) else kept[0]).double())
        errors[repair] = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    told = rewrite.figures[layer.index]  # type: ignore[union-attr]
    assert errors[None] == pytest.approx(told["unrepaired"], rel=1e-4)
    assert errors[BlockRepair()] == pytest.approx(told["repaired"], rel=1e-4)
    assert told["repaired"] < told["unrepaired"]


def test_all_experts_kept_is_the_model_and_the_repair_decides_nothing(checkpoint: Checkpoint) -> None:
    bare, mended = planned(checkpoint, None), planned(checkpoint, BlockRepair())
    assert bare.outcomes == mended.outcomes
    assert bare.hash != mended.hash
    assert mended.file.repair == BlockRepair()
    request = PlanRequest(make_method("prune", "random", {}), Budget(keep=1.0), repair=BlockRepair())
    plan = make_layers(checkpoint, TEXT, [plan_weights(checkpoint, None, request)])[0]
    assert plan.made is None
    rewrite = rewriter(plan, checkpoint)
    assert rewrite is not None
    for layer in find_moe_layers(build(FAMILY)):
        weights = read_block(layer)
        assert torch.equal(rewrite(layer.index, weights).down_EHI, weights.down_EHI)


def test_tokens_that_are_sent_elsewhere_are_not_followed(checkpoint: Checkpoint) -> None:
    with pytest.raises(BadConfig, match="leave the repair out") as told:
        planned(checkpoint, BlockRepair(), "prune", "mone")
    assert told.value.layer is not None
