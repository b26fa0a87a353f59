"""Several rows for one expert, worked by hand and against models that were never merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import moekit
from moekit.anatomy import Gate, GateSpec, Geometry, MoELayer, find_moe_layers, identify_gate
from moekit.compress.maths.neurons.align import align_experts
from moekit.compress.maths.neurons.merging import merge_groups
from moekit.compress.weights import LayerWeights, from_live, to_live
from moekit.errors import BadConfig
from moekit.routing import RoutingPlan
from moekit.routing.methods.merge_redirect import MergeRedirect, add_up, share_rows
from moekit.routing.plan import PlanHeader
from moekit.runtime import attach
from tests.families import FAMILIES, build, logits
from tests.routing import routed

GROUPS = [(0, 5), (1, 2, 7), (3,), (4, 6)]


def test_gates_of_one_expert_add_up() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2]])
    experts = torch.tensor([[1, 0, 1], [2, 1, 0], [3, 3, 3]])
    sums, indices = add_up(weights, experts, 4)
    torch.testing.assert_close(sums, torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.3, 0.1], [1.0, 0.0, 0.0]]))
    assert indices.tolist() == [[1, 0, 2], [2, 1, 0], [3, 0, 1]]


def test_a_token_by_hand() -> None:
    # Rows are unit vectors, so logits are the hidden state; rows 0 and 2 are expert 1's, row 1 is expert 0's.
    policy = MergeRedirect()
    tensors = share_rows([(1,), (0, 2)], torch.eye(3))
    assert tensors["members"].tolist() == [[1, -1], [0, 2]]
    prepared = policy.prepare(tensors, Geometry(3, 2, 2, 4, 0, True, False, False, True))
    assert prepared["expert"].tolist() == [1, 0, 1]
    gate = Gate(GateSpec(2), nn.Identity())
    hidden = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    weights, indices = routed(policy, gate, torch.zeros(2, 2), prepared, hidden)
    # softmax(2, 0, 1) = (.665241, .090031, .244728); softmax(0, 1, -1) = (.244728, .665241, .090031)
    assert indices.tolist() == [[1, 0], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.909969, 0.0], [0.665241, 0.244728]]), atol=1e-6, rtol=0)


def test_every_row_needs_one_expert() -> None:
    for groups in ([(0, 1)], [(0, 1), (1, 2)]):
        with pytest.raises(BadConfig, match="3 router rows"):
            share_rows(groups, torch.eye(3))
    with pytest.raises(BadConfig, match="3 router rows do not divide into 2 groups"):
        MergeRedirect(groups=2).prepare(
            share_rows([(0, 1), (2,)], torch.eye(3)), Geometry(3, 2, 1, 4, 0, True, False, False, True)
        )


def parts(layer: MoELayer) -> LayerWeights:
    """A live layer's weights, copied."""
    experts = {n: p.detach() for n, p in layer.experts._parameters.items() if p is not None}
    router = layer.require_router()
    named = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    rows = {n: t.detach() for n, t in named.items() if t.shape[:1] == (layer.geometry.experts,)}
    return from_live(experts, rows, layer.geometry).map(torch.clone)


def policy_for(layer: MoELayer, groups: list[tuple[int, ...]]) -> tuple[MergeRedirect, dict[str, Tensor]]:
    """The policy that routes by a layer's own rows."""
    spec, router = identify_gate(layer), parts(layer).router
    choice = Gate(spec, layer.require_router()).bias()
    bias = next((t for n, t in router.items() if n in ("bias", "layer.bias")), None)
    policy = MergeRedirect(groups=spec.groups, top_groups=spec.top_groups, group_score=spec.group_score)
    return policy, share_rows(groups, parts(layer).router_EH, bias, choice)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_that_each_have_their_expert_route_as_the_family_does(family: str) -> None:
    model = build(family)
    stock = logits(model)
    made = {layer.index: policy_for(layer, [(e,) for e in range(8)]) for layer in find_moe_layers(model)}
    policy, _ = next(iter(made.values()))
    attach(model, policy, {layer: tensors for layer, (_, tensors) in made.items()})
    torch.testing.assert_close(logits(model), stock, atol=1e-6, rtol=1e-6)


def twins(model: PreTrainedModel) -> None:
    """Make the experts of each group of GROUPS shuffled copies of each other, in place."""
    for layer in find_moe_layers(model):
        weights = parts(layer)
        for group in GROUPS:
            for e in group[1:]:
                order = torch.randperm(weights.width, generator=torch.Generator().manual_seed(e))
                for t in (weights.up_EIH, weights.gate_EIH, weights.up_bias_EI, weights.gate_bias_EI):
                    if t is not None:
                        t[e] = t[group[0]][order]
                weights.down_EHI[e] = weights.down_EHI[group[0]][:, order]
                if weights.down_bias_EH is not None:
                    weights.down_bias_EH[e] = weights.down_bias_EH[group[0]]
        for name, tensor in to_live(weights, layer.geometry).items():
            layer.experts.get_parameter(name).data.copy_(tensor)


def merged_model(family: str, base: PreTrainedModel, router: str = "mean") -> PreTrainedModel:
    """A model of four experts a layer: the base's, aligned and merged by GROUPS; all else is the base's."""
    small = build(family, num_experts=4, num_local_experts=4)
    state = {n: t for n, t in base.state_dict().items() if t.shape == small.state_dict()[n].shape}
    small.load_state_dict(state, strict=False)
    for old, new in zip(find_moe_layers(base), find_moe_layers(small), strict=True):
        weights = parts(old)
        shares = [[1 / len(g)] * len(g) for g in GROUPS]
        merged = merge_groups(
            weights,
            [g[0] for g in GROUPS],
            GROUPS,
            shares,
            match=lambda r, m, w=weights: align_experts(w, r, m).order_I,
            router=router,  # type: ignore[arg-type]
        )
        for name, tensor in to_live(merged, new.geometry).items():
            new.experts.get_parameter(name).data.copy_(tensor)
        for name, tensor in merged.router.items():
            new.require_router().get_parameter(name).data.copy_(tensor)
    return small


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "phimoe"])
def test_merged_copies_give_the_base_models_outputs_exactly(family: str, tmp_path: Path) -> None:
    base = build(family)
    twins(base)
    wanted = logits(base)
    small = merged_model(family, base)
    plain = logits(small)
    assert (plain - wanted).abs().max() > 0.01, "merged rows alone route otherwise"
    tensors = {}
    for old, new in zip(find_moe_layers(base), find_moe_layers(small), strict=True):
        policy, tensors[new.index] = policy_for(old, GROUPS)
    header = PlanHeader(
        policy="merge-redirect", config=policy.model_dump(), layers=list(tensors), experts=[4] * len(tensors)
    )
    RoutingPlan(header, tensors).apply(small)
    torch.testing.assert_close(logits(small), wanted, atol=1e-5, rtol=1e-5)
    moekit.save(small, tmp_path / "out")
    again = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu").eval()
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)
    stock = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu", parts=False).eval()
    torch.testing.assert_close(logits(stock), plain, atol=1e-5, rtol=1e-5)


def test_reordered_experts_keep_their_rows() -> None:
    tensors = share_rows(GROUPS, torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8.0))
    order = [2, 0, 3, 1]
    policy, geometry = MergeRedirect(), Geometry(5, 4, 2, 4, 0, True, False, False, True)
    old, new = policy.prepare(tensors, geometry), policy.prepare(policy.permute(tensors, order), geometry)
    assert torch.equal(old["rows"], new["rows"])
    assert torch.equal(old["bias"], new["bias"])
    assert torch.equal(torch.tensor(order)[new["expert"]], old["expert"])


def test_a_model_may_choose_more_rows_than_it_now_would() -> None:
    prepared = MergeRedirect().prepare(
        share_rows([(0, 1), (2,)], torch.eye(3)), Geometry(3, 2, 1, 4, 0, True, False, False, True)
    )
    gate = Gate(GateSpec(1, normalise=True), nn.Identity())
    hidden = torch.tensor([[2.0, 1.0, 0.0]])
    weights, indices = routed(MergeRedirect(top_k=2), gate, torch.zeros(1, 2), prepared, hidden)
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]))
    with pytest.raises(BadConfig, match="top_k is 3, but there are 2 experts") as caught:
        MergeRedirect(top_k=3).check(Geometry(3, 2, 1, 4, 0, True, False, False, True), 5)
    assert caught.value.layer == 5
