"""Plans: stored with their scores, applied to the right model only, permuted with the experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.anatomy import find_moe_layers, permute_experts
from moekit.errors import BadConfig, BadData, UnsafeInput
from moekit.routing import C2R, RoutingPlan, partner_lists, plan_routing
from moekit.runtime import attached, detach
from tests.families import EXPERTS, build, logits


def counts(model, seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for layer in find_moe_layers(model):
        half = torch.randint(0, 99, (EXPERTS, EXPERTS), generator=generator)
        result[layer.index] = {"coactivation": half + half.T}
    return result


def a_plan(model, top_t: int = 2, fingerprint: str = "") -> RoutingPlan:
    return plan_routing(find_moe_layers(model), C2R(top_t=top_t), "c2r", counts(model), fingerprint=fingerprint)


def test_round_trip_keeps_tensors_scores_and_hash(tmp_path: Path) -> None:
    plan = a_plan(build("mixtral"), fingerprint="abc")
    plan.save(tmp_path / "plan")
    again = RoutingPlan.load(tmp_path / "plan")
    assert again.header == plan.header
    assert again.hash == plan.hash
    for layer, named in plan.scores.items():
        assert torch.equal(again.scores[layer]["coactivation"], named["coactivation"])
        assert torch.equal(again.tensors[layer]["partners"].long(), partner_lists(named["coactivation"]))


def test_another_t_needs_no_new_trace() -> None:
    model = build("mixtral")
    stock = logits(model)
    plan = a_plan(model, top_t=1)
    loose = plan.with_config(top_t=EXPERTS - 1)
    assert loose.hash != plan.hash
    loose.apply(model)
    assert torch.equal(logits(model), stock)
    with pytest.raises(BadConfig, match="top_t"):
        plan.with_config(top_t=0)


def test_unknown_knobs_and_names_get_near_matches() -> None:
    from moekit.routing.plan import make_policy

    with pytest.raises(BadConfig, match="top_k"):
        make_policy("c2r", {"top_k": 3})
    with pytest.raises(BadConfig) as caught:
        make_policy("c2", {})
    assert "c2r" in str(caught.value.hint)


def test_a_plan_for_another_model_is_refused_and_nothing_stays_attached() -> None:
    plan = a_plan(build("mixtral"), fingerprint="a" * 64)
    other = build("mixtral", num_hidden_layers=1)
    with pytest.raises(BadConfig, match="MoE layer of 8 experts"):
        plan.apply(other)
    with pytest.raises(BadConfig, match="made for model aaaaaaaaaaaa"):
        plan.apply(build("mixtral"), fingerprint="b" * 64)
    assert attached(other) == []
    small = build("mixtral", num_local_experts=4)
    with pytest.raises(BadConfig):
        plan.apply(small)
    assert attached(small) == []


def test_a_plan_that_lacks_a_tensor_is_refused_whole() -> None:
    """The first layer fits, the second lacks its lists: the model routes as before, and the next plan applies."""
    model = build("mixtral")
    stock = logits(model)
    good = a_plan(model, top_t=1)
    bad = RoutingPlan(good.header, {layer: {} if layer == 1 else named for layer, named in good.tensors.items()})
    with pytest.raises(BadConfig, match="there is no 'partners'") as refused:
        bad.apply(model)
    assert refused.value.layer == 1
    assert attached(model) == []
    assert torch.equal(logits(model), stock)
    good.apply(model)
    routed = logits(model)
    with pytest.raises(BadConfig):
        bad.apply(model)
    assert torch.equal(logits(model), routed), "the plan before stays"


def test_model_and_plan_permuted_together_compute_the_same() -> None:
    model = build("qwen2_moe")
    plan = a_plan(model, top_t=1)
    plan.apply(model)
    routed = logits(model)
    detach(model)
    orders = {0: [3, 1, 7, 0, 2, 5, 6, 4], 1: [7, 6, 5, 4, 3, 2, 1, 0]}
    permute_experts(model, orders)
    plan.permuted(orders).apply(model)
    torch.testing.assert_close(logits(model), routed, atol=1e-5, rtol=1e-5)
    plan.apply(model)
    assert not torch.allclose(logits(model), routed, atol=1e-3)


def test_damaged_plans(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no routing plan"):
        RoutingPlan.load(tmp_path)
    a_plan(build("mixtral")).save(tmp_path / "plan")
    header = tmp_path / "plan" / "plan.json"
    text = header.read_text()
    header.write_text(text.replace('"policy"', '"polizei"'))
    with pytest.raises(BadData, match="damaged"):
        RoutingPlan.load(tmp_path / "plan")
    header.write_text(text)
    tensors = tmp_path / "plan" / "plan.safetensors"
    tensors.write_bytes((2**63 - 1).to_bytes(8, "little") + tensors.read_bytes()[8:])
    with pytest.raises(UnsafeInput):
        RoutingPlan.load(tmp_path / "plan")


def test_output_router_logits_still_works_under_a_policy() -> None:
    model = build("qwen2_moe")
    a_plan(model).apply(model)
    out = model(input_ids=torch.arange(3, 11)[None], output_router_logits=True, use_cache=False)
    assert len(out.router_logits) == 2
    assert out.router_logits[0].shape == (8, EXPERTS)
