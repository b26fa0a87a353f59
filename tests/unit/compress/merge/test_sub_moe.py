"""Sub-MoE: what it must equal, how it clusters, and how layers share a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu

from moekit.anatomy import find_moe_layers
from moekit.anatomy.probe import Geometry
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.inputs import InputsByLayer, LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.compress.merge.sub_moe import SubMoE
from moekit.compress.weights import LayerWeights
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import record_streamed
from tests.checkpoints import plain
from tests.families import EXPERTS, WIDTH, build, tokens

TEXT: list[Any] = [tokens(3, 20, seed=5), tokens(2, 9, seed=6)]
GEOMETRY = Geometry(3, 6, 1, 2, 0, True, False, False, True)
LOAD = (4, 7, 0, 3, 5, 2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosines(groups: tuple[int, ...], noise: float = 0.1, count: int = 50) -> Tensor:
    """Sums of cosines of outputs that point where their group does, with some noise."""
    experts, total = len(groups), torch.zeros(len(groups), len(groups), dtype=torch.float64)
    for _ in range(count):
        centres = torch.linalg.qr(torch.randn(6, 6, generator=seeded(_), dtype=torch.float64)).Q
        made = torch.stack([centres[g] for g in groups])
        made += noise * torch.randn(experts, 6, generator=seeded(99 + _), dtype=torch.float64)
        made = made / made.norm(dim=1, keepdim=True)
        total += made @ made.T
    return total


def layer(cosine_EE: Tensor, index: int = 5, protected: tuple[int, ...] = (), **further: Tensor) -> LayerInputs:
    values = {"load": torch.tensor(LOAD), "all_output_cosine": cosine_EE, **further}
    return LayerInputs(index, GEOMETRY, LayerStatistics(6, 3, (), 50, values), protected=frozenset(protected))


def weights(dtype: torch.dtype = torch.float64) -> LayerWeights:
    def draw(*shape: int) -> Tensor:
        return torch.randn(6, *shape, generator=seeded(sum(shape)), dtype=dtype)

    return LayerWeights(draw(2, 3), draw(3, 2), draw(2, 3) + 1, router={"gate.weight": draw(3)})


def decided(method: SubMoE, inputs: LayerInputs, keep: int) -> LayerOutcome:
    return method.decide(inputs, method.score(inputs), keep)


def test_experts_that_give_alike_outputs_become_one_whatever_their_numbers() -> None:
    made = decided(SubMoE(), layer(cosines((0, 1, 0, 2, 1, 0))), 3)
    assert made.sources == ((0, 2, 5), (1, 4), (3,))
    assert made.keep == (0, 1, 3)
    assert made.shares == (pytest.approx((4 / 6, 0, 2 / 6)), pytest.approx((7 / 12, 5 / 12)), (1.0,))
    order = [3, 5, 0, 1, 4, 2]
    moved = decided(SubMoE(), layer(cosines((0, 1, 0, 2, 1, 0))[order][:, order]), 3)
    groups = {frozenset(order[e] for e in group) for group in moved.sources or ()}
    assert groups == {frozenset(group) for group in made.sources}


def test_the_cost_is_told() -> None:
    inputs = layer(cosines((0, 1, 0, 2, 1, 0)))
    made = decided(SubMoE(), inputs, 3)
    sim = inputs.statistics["all_output_cosine"] / 50
    # Squared distances to the mean are half the mean of those of all pairs.
    pairs = sum(2 * (1 - sim[i, j]) / (2 * len(g)) for g in made.sources or () for i in g for j in g)
    assert made.figures["cost"] == pytest.approx(float(pairs))


def test_without_rank_it_is_the_mean_by_use() -> None:
    inputs, before = layer(cosines((0, 1, 0, 2, 1, 0))), weights()
    made = SubMoE().transform(before, decided(SubMoE(), inputs, 3), inputs)
    torch.testing.assert_close(made.up_EIH[0], 4 / 6 * before.up_EIH[0] + 2 / 6 * before.up_EIH[5])
    torch.testing.assert_close(made.down_EHI[1], 7 / 12 * before.down_EHI[1] + 5 / 12 * before.down_EHI[4])
    assert torch.equal(made.up_EIH[2], before.up_EIH[3])
    assert torch.equal(made.router["gate.weight"], before.router["gate.weight"][[0, 1, 3]])
    alone = decided(SubMoE(rank=1), inputs, 6)
    assert torch.equal(SubMoE(rank=1).transform(before, alone, inputs).up_EIH, before.up_EIH)


def basis(matrices: list[Tensor], rank: int) -> Tensor:
    """First left singular vectors of matrices side by side."""
    return torch.linalg.svd(torch.cat(matrices, dim=1)).U[:, :rank]


@pytest.mark.parametrize("whiten", [False, True])
def test_with_rank_the_mean_is_projected_on_what_members_share(whiten: bool) -> None:
    outer, inner = (torch.randn(6, 9, n, generator=seeded(n), dtype=torch.float64) for n in (3, 2))
    moments = {"input_moment": outer.transpose(1, 2) @ outer, "inner_moment": inner.transpose(1, 2) @ inner}
    inputs, before = layer(cosines((0, 1, 0, 2, 1, 0)), **moments), weights()
    method = SubMoE(rank=1, whiten=whiten)
    outcome = decided(method, inputs, 3)
    made, mean = (m.transform(before, outcome, inputs) for m in (method, SubMoE()))
    for name, seen in (("gate_EIH", outer), ("up_EIH", outer), ("down_EHI", inner)):
        stack, means = getattr(before, name), getattr(mean, name)
        for position, group in ((0, (0, 2, 5)), (1, (1, 4))):
            roots = [torch.linalg.cholesky(seen[e].T @ seen[e]) if whiten else torch.eye(seen.shape[2]) for e in group]
            u = basis([stack[e] @ r.double() for e, r in zip(group, roots, strict=True)], 1)
            torch.testing.assert_close(getattr(made, name)[position], u @ u.T @ means[position])
        assert torch.equal(getattr(made, name)[2], stack[3])
    full = SubMoE(rank=3, whiten=whiten).transform(before, outcome, inputs)
    torch.testing.assert_close(full.down_EHI, mean.down_EHI)


def test_whitened_experts_that_no_token_chose_are_projected_on_what_their_weights_share() -> None:
    """Nothing is known of their inputs: all count alike, as without whitening."""
    moments = {"input_moment": torch.zeros(6, 3, 3), "inner_moment": torch.zeros(6, 2, 2)}
    inputs, before = layer(cosines((0, 1, 0, 2, 1, 0)), **moments), weights()
    outcome = decided(SubMoE(rank=1, whiten=True), inputs, 3)
    made, plain_ = (SubMoE(rank=1, whiten=w).transform(before, outcome, inputs) for w in (True, False))
    torch.testing.assert_close(made.up_EIH, plain_.up_EIH)
    torch.testing.assert_close(made.down_EHI, plain_.down_EHI)


def test_aligned_members_share_a_subspace_whatever_the_order_of_their_neurons() -> None:
    inner = torch.randn(6, 9, 2, generator=seeded(2), dtype=torch.float64)
    moment = inner.transpose(1, 2) @ inner
    outer = torch.eye(3, dtype=torch.float64).repeat(6, 1, 1)
    method, results = SubMoE(rank=1, whiten=True, align="weights"), []
    for flipped in (False, True):
        before, own = weights(), moment.clone()
        if flipped:  # the same expert 5 with its neurons the other way round
            for stack in (before.up_EIH, before.gate_EIH):
                assert stack is not None
                stack[5] = stack[5].flip(0)
            before.down_EHI[5], own[5] = before.down_EHI[5].flip(1), own[5].flip(0, 1)
        inputs = layer(cosines((0, 1, 0, 2, 1, 0)), input_moment=outer, inner_moment=own)
        results.append(method.transform(before, decided(method, inputs, 3), inputs))
    one, other = results
    torch.testing.assert_close(one.up_EIH, other.up_EIH)
    torch.testing.assert_close(one.gate_EIH, other.gate_EIH)
    torch.testing.assert_close(one.down_EHI, other.down_EHI)


def shared(budget: int, span: int, layers: list[Tensor], protected: dict[int, tuple[int, ...]] | None = None) -> Any:
    statistics = {
        n: LayerStatistics(6, 3, (), 50, {"load": torch.tensor(LOAD), "all_output_cosine": cosine})
        for n, cosine in enumerate(layers)
    }
    inputs = InputsByLayer(dict.fromkeys(statistics, GEOMETRY), statistics, None, 0, protected)
    method = SubMoE(span=span)
    return method.share(inputs, {n: method.score(inputs[n]) for n in inputs}, budget, 2, 6)


def test_layers_whose_experts_are_alike_give_more() -> None:
    apart, pairs, alike = cosines((0, 1, 2, 3, 4, 5)), cosines((0, 0, 1, 1, 2, 2)), cosines((0, 0, 0, 1, 1, 1))
    # 3 merges of layer 1 and 4 of layer 2 cost next to nothing.
    assert shared(11, 0, [apart, pairs, alike]) == {0: 6, 1: 3, 2: 2}
    # Eight stay in each pair.
    assert shared(16, 2, [apart, pairs, alike, apart]) == {0: 5, 1: 3, 2: 2, 3: 6}
    assert shared(11, 0, [apart, pairs, alike], {2: (0, 1, 2)})[2] == 4


def test_a_whole_model_keeps_as_many_as_the_budget_says(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    trace = record_streamed(checkpoint, TEXT, statistics=SubMoE().required)
    plan = plan_weights(checkpoint, trace, PlanRequest(SubMoE(), Budget(keep=5, scope="global")))
    assert sum(outcome.experts for outcome in plan.outcomes.values()) == 10
    assert min(outcome.experts for outcome in plan.outcomes.values()) >= 2


@torch.no_grad()
def test_similarity_is_the_mean_cosine_of_all_outputs_on_all_tokens(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    trace = record_streamed(checkpoint, TEXT, statistics=("all_output_cosine",))
    experts, seen = find_moe_layers(model)[1].experts, list[Tensor]()
    hook = experts.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    for batch in TEXT:
        model(input_ids=batch, use_cache=False)
    hook.remove()
    x_NH, made = torch.cat(seen), []
    for e in range(EXPERTS):
        gate, up = experts.gate_up_proj[e].split(WIDTH)
        made.append((silu(x_NH @ gate.T) * (x_NH @ up.T)) @ experts.down_proj[e].T)
    expected = torch.stack([torch.stack([cosine_similarity(a, b).sum() for b in made]) for a in made])
    torch.testing.assert_close(trace.statistics[1]["all_output_cosine"].float(), expected, rtol=1e-4, atol=1e-3)


def test_what_would_change_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="whiten changes nothing without rank"):
        SubMoE(whiten=True)
