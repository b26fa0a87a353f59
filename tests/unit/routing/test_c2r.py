"""C2R against the paper's rule, worked by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from torch import nn

from moekit.anatomy import Gate, GateSpec, Geometry
from moekit.errors import BadConfig, BadData
from moekit.routing import C2R, partner_lists
from moekit.routing.methods.c2r import allowed_partners
from moekit.runtime import PlanInputs
from tests.routing import routed

LOGITS = torch.tensor([[2.0, 1.5, 0.5, 1.0]])
LISTS = torch.tensor([[2, 3, 1, 0], [0, 2, 3, 1], [0, 1, 3, 2], [0, 1, 2, 3]])


def geometry(experts: int = 4, top_k: int = 2) -> Geometry:
    return Geometry(8, experts, top_k, 8, 0, True, False, False, True)


def gate(top_k: int = 2, **spec: object) -> Gate:
    return Gate(GateSpec(top_k, **spec), nn.Identity())  # type: ignore[arg-type]


def route(policy: C2R, tensors: dict[str, torch.Tensor], logits: torch.Tensor, top_k: int = 2, **spec: object):
    prepared = policy.prepare(tensors, geometry(logits.shape[1], top_k))
    return routed(policy, gate(top_k, **spec), logits, prepared)


@pytest.mark.parametrize(("top_t", "expected"), [(1, {0, 2}), (2, {0, 3}), (3, {0, 1})])
def test_four_experts_by_hand(top_t: int, expected: set[int]) -> None:
    _, indices = route(C2R(top_t=top_t), {"partners": LISTS}, LOGITS)
    assert set(indices[0].tolist()) == expected


def test_t_equal_to_e_is_refused_with_the_nearest_value() -> None:
    with pytest.raises(BadConfig, match=r"\[1, 3\]") as caught:
        C2R(top_t=4).check(geometry(), layer=7)
    assert caught.value.layer == 7
    assert "3" in str(caught.value.hint)


def test_t_below_k_minus_1_is_refused() -> None:
    with pytest.raises(BadConfig):
        C2R(top_t=2).check(geometry(8, top_k=4), layer=0)


@pytest.mark.parametrize(
    ("top_t", "expected"), [(1, [0.817574, 0.182426]), (2, [0.731059, 0.268941]), (3, [0.622459, 0.377541])]
)
def test_llama_weights_are_a_softmax_over_the_chosen(top_t: int, expected: list[float]) -> None:
    weights, _ = route(C2R(top_t=top_t, weights="selected"), {"partners": LISTS}, LOGITS)
    torch.testing.assert_close(weights[0], torch.tensor(expected), atol=1e-6, rtol=0)


def test_llama_score_scale_factor_multiplies() -> None:
    weights, _ = route(C2R(top_t=1, weights="selected"), {"partners": LISTS}, LOGITS, scale=4.0)
    torch.testing.assert_close(weights[0], torch.tensor([0.817574, 0.182426]) * 4, atol=4e-6, rtol=0)


def test_qwen_weights_are_not_renormalised() -> None:
    weights, _ = route(C2R(top_t=2), {"partners": LISTS}, LOGITS)
    torch.testing.assert_close(weights[0], torch.tensor([0.455054, 0.167405]), atol=1e-6, rtol=0)


def test_partner_list_of_counted_pairs_breaks_ties_by_index() -> None:
    counts = torch.zeros(4, 4, dtype=torch.int64)
    for i, j in [(0, 2)] * 3 + [(0, 3), (3, 1), (1, 0)]:
        counts[i, j] += 1
        counts[j, i] += 1
    assert counts[0].tolist() == [0, 1, 3, 1]
    assert partner_lists(counts)[0].tolist() == [2, 1, 3, 0]


def test_an_expert_is_its_own_last_partner_even_without_counts() -> None:
    assert partner_lists(torch.zeros(3, 3)).tolist() == [[1, 2, 0], [0, 2, 1], [0, 1, 2]]


def test_list_mode_without_counts_says_what_to_do() -> None:
    with pytest.raises(BadData, match="co-activation"):
        C2R(top_t=1).plan(PlanInputs(3, geometry()))


def test_device_mode_without_placement_and_with_too_small_devices() -> None:
    policy = C2R(mode="device")
    with pytest.raises(BadConfig, match="which device"):
        policy.plan(PlanInputs(0, geometry()))
    with pytest.raises(BadConfig, match="only 1 experts"):
        policy.plan(PlanInputs(0, geometry(), devices=[0, 1, 2, 3]))


def test_modes_and_knobs_must_agree() -> None:
    with pytest.raises(ValidationError):
        C2R()
    with pytest.raises(ValidationError):
        C2R(mode="device", top_t=3)


cases = st.tuples(st.integers(3, 12), st.integers(1, 4), st.integers(0, 2**31)).filter(lambda c: c[1] < c[0])


def random_case(experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (experts, experts), generator=generator)
    return torch.randn(17, experts, generator=generator), partner_lists(counts + counts.T)


SCORINGS = [
    {},
    {"normalise": True},
    {"scoring": "sigmoid", "normalise": True, "epsilon": 1e-20, "scale": 2.5},
    {"scoring": "selected_softmax"},
]


@settings(max_examples=60, deadline=None)
@given(case=cases, spec=st.sampled_from(SCORINGS))
def test_t_equal_to_e_minus_1_is_plain_top_k_bit_for_bit(case: tuple[int, int, int], spec: dict[str, object]) -> None:
    experts, top_k, seed = case
    logits, lists = random_case(experts, seed)
    weights, indices = route(C2R(top_t=experts - 1), {"partners": lists}, logits, top_k, **spec)
    plain_weights, plain_indices = gate(top_k, **spec)(logits)
    assert torch.equal(indices, plain_indices)
    assert torch.equal(weights, plain_weights)


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_every_choice_obeys_the_rule(case: tuple[int, int, int]) -> None:
    experts, top_k, seed = case
    logits, lists = random_case(experts, seed)
    scores = logits.softmax(-1)
    for top_t in range(max(top_k - 1, 1), experts):
        weights, indices = route(C2R(top_t=top_t), {"partners": lists}, logits, top_k)
        for row, chosen in enumerate(indices.tolist()):
            # The paper's rule, token by token: the best expert, then the best among its first T partners.
            first = max(range(experts), key=lambda e: float(logits[row, e]))
            partners = sorted(lists[first, :top_t].tolist(), key=lambda e: -float(logits[row, e]))
            assert chosen[0] == first
            assert sorted(chosen) == sorted([first, *partners[: top_k - 1]])
            torch.testing.assert_close(weights[row], scores[row, indices[row]])
        assert torch.equal(weights[:, 0], scores.max(dim=-1).values)


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_allowed_pairs_are_nested_in_t(case: tuple[int, int, int]) -> None:
    experts, _, seed = case
    _, lists = random_case(experts, seed)
    masks = [allowed_partners(lists, top_t) for top_t in range(1, experts)]
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(masks))
    assert bool(masks[-1].all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), devices=st.sampled_from([2, 4]), limit=st.integers(1, 2))
def test_device_mode_is_group_limited_routing(seed: int, devices: int, limit: int) -> None:
    logits, _ = random_case(16, seed)
    policy = C2R(mode="device", max_devices=limit)
    plan = policy.plan(PlanInputs(0, geometry(16, 4), devices=[e // (16 // devices) for e in range(16)]))
    weights, indices = route(policy, plan, logits, 4)
    reached = {len({e // (16 // devices) for e in row}) for row in indices.tolist()}
    assert max(reached) <= limit
    limited = gate(4, groups=devices, top_groups=limit, group_score="max")
    plain_weights, plain_indices = limited(logits)
    # As sets: of two scores that are equal in fp32 either may come first.
    assert torch.equal(indices.sort().values, plain_indices.sort().values)
    assert torch.equal(weights.sort().values, plain_weights.sort().values)


def test_a_list_is_stronger_than_expert_groups() -> None:
    # Groups {0,1},{2,3}; expert 0 wins, its group is {0,1}, but only 3 is an allowed partner.
    logits = torch.tensor([[3.0, 2.5, 1.0, 0.5]])
    lists = torch.tensor([[3, 2, 1, 0], [0, 2, 3, 1], [0, 1, 3, 2], [0, 1, 2, 3]])
    _, indices = route(C2R(top_t=1), {"partners": lists}, logits, groups=2, top_groups=1, group_score="max")
    assert indices.tolist() == [[0, 3]]


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_permuted_lists_choose_the_same_experts(case: tuple[int, int, int]) -> None:
    experts, top_k, seed = case
    logits, lists = random_case(experts, seed)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed)).tolist()
    policy = C2R(top_t=max(top_k - 1, 1))
    weights, indices = route(policy, {"partners": lists}, logits, top_k)
    moved = policy.permute({"partners": lists}, order)
    moved_weights, moved_indices = route(policy, moved, logits[:, order], top_k)
    assert torch.equal(torch.tensor(order)[moved_indices], indices)
    torch.testing.assert_close(moved_weights, weights)
