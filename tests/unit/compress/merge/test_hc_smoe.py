"""HC-SMoE against the numbers of its worked example and the identities of a tree."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import of
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.merge.hc_smoe import HCSMoE
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault
from moekit.trace.statistics import LayerStatistics

FEATURES_EH = torch.tensor([[0, 0], [1, 0], [1, 1.2], [5, 5], [5, 6.5], [9, 0]], dtype=torch.float64)
LOAD = (2, 1, 1, 3, 0, 3)
THREE = ((0, 1, 2), (3, 4), (5,))


def inputs(
    made_ETH: Tensor, load: Sequence[int] = LOAD, *, number: int = 0, protected: Sequence[int] = ()
) -> LayerInputs:
    """A layer whose experts put this out."""
    experts, tokens, hidden = made_ETH.shape
    values = {
        "load": torch.tensor(load),
        "all_output_sum": made_ETH.sum(1),
        "all_output_gram": torch.einsum("eth,fth->ef", made_ETH, made_ETH),
    }
    statistics = LayerStatistics(experts, hidden, tokens=tokens, values=values)
    geometry = Geometry(hidden, experts, 1, 2, 0, True, False, False, True)
    return LayerInputs(number, geometry, statistics, protected=frozenset(protected))


def steady(features_EH: Tensor, tokens: int = 3) -> Tensor:
    """Outputs that are the same on every token."""
    return features_EH[:, None].expand(-1, tokens, -1)


def decide(method: HCSMoE, seen: LayerInputs, keep: int) -> LayerOutcome:
    return method.decide(seen, method.score(seen), keep)


def groups(method: HCSMoE, seen: LayerInputs, keep: int) -> set[frozenset[int]]:
    return {frozenset(group) for group in decide(method, seen, keep).sources or ()}


def scalar(values: Sequence[float]) -> LayerWeights:
    """Experts of one neuron, all of whose weights are one number."""
    stack = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
    return LayerWeights(stack, stack.clone(), stack.clone(), router={"weight": stack[:, 0].clone()})


@pytest.mark.parametrize("feature", ["mean", "rms"])
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (4, ((0, 1, 2), (3,), (4,), (5,))),
        (3, THREE),
        (2, ((0, 1, 2, 3, 4), (5,))),
    ],
)
def test_clusters_by_hand(feature: str, keep: int, expected: tuple[tuple[int, ...], ...]) -> None:
    # Outputs that never change have the distances of their means.
    assert decide(HCSMoE(feature=feature), inputs(steady(FEATURES_EH)), keep).sources == expected


@pytest.mark.parametrize("linkage", ["complete", "ward"])
def test_two_clusters_of_other_linkages_by_hand(linkage: str) -> None:
    assert decide(HCSMoE(linkage=linkage), inputs(steady(FEATURES_EH)), 2).sources == ((0, 1, 2), (3, 4, 5))


def test_single_linkage_by_hand() -> None:
    seen = inputs(steady(FEATURES_EH))
    assert decide(HCSMoE(linkage="single"), seen, 2).sources == ((0, 1, 2, 3, 4), (5,))


def test_merged_weights_by_hand() -> None:
    seen, weights = inputs(steady(FEATURES_EH)), scalar((1, 2, 4, 3, 9, 5))
    outcome = decide(HCSMoE(), seen, 3)
    assert outcome.keep == (0, 3, 5)
    assert outcome.sources == THREE
    merged = HCSMoE().transform(weights, outcome, seen)
    for stack in (merged.up_EIH, merged.gate_EIH, merged.down_EHI):
        assert stack is not None
        assert stack.flatten().tolist() == [2.0, 3.0, 5.0]
    assert merged.router_EH.flatten().tolist() == [1.0, 3.0, 5.0]
    plain = HCSMoE(weigh="equal")
    again = plain.transform(weights, decide(plain, seen, 3), seen)
    assert again.up_EIH.flatten().tolist() == pytest.approx([7 / 3, 6.0, 5.0])


def test_how_near_members_are_is_told() -> None:
    # Within: 1, 1.562050, 1.2 and 1.5.
    figures = decide(HCSMoE(), inputs(steady(FEATURES_EH)), 3).figures
    mean = float(torch.cdist(FEATURES_EH, FEATURES_EH).sum()) / 30
    assert figures["distance_within_groups"] == pytest.approx((1 + 1.562050 + 1.2 + 1.5) / 4 / mean, abs=1e-6)
    assert figures["largest_group"] == 3
    assert figures["alone"] == 1


def test_a_cluster_that_was_never_used_is_the_plain_mean_and_not_zero() -> None:
    seen, weights = inputs(steady(FEATURES_EH), (2, 1, 1, 0, 0, 3)), scalar((1, 2, 4, 3, 9, 5))
    merged = HCSMoE().transform(weights, decide(HCSMoE(), seen, 3), seen)
    assert merged.up_EIH.flatten().tolist() == [2.0, 6.0, 5.0]


def test_shares_do_not_depend_on_the_length_of_the_text() -> None:
    one, many = (decide(HCSMoE(), inputs(steady(FEATURES_EH), [n * c for n in LOAD]), 3) for c in (1, 1000))
    assert one.shares == many.shares


def test_outputs_that_cancel_are_told_apart_by_rms_alone() -> None:
    # 0 and 1 have the mean 0 and are opposites; 2 is near 0 on every token.
    swing = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    seen = inputs(torch.stack([swing, -swing, swing + 0.1]), (3, 2, 1))
    assert decide(HCSMoE(), seen, 2).sources == ((0, 1), (2,))
    assert decide(HCSMoE(feature="rms"), seen, 2).sources == ((0, 2), (1,))


@pytest.mark.parametrize("feature", ["mean", "rms"])
@pytest.mark.parametrize("linkage", ["average", "single", "complete", "ward"])
def test_clusters_depend_neither_on_numbers_nor_on_scale_nor_on_what_all_share(feature: str, linkage: str) -> None:
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(10, 20, 4, generator=generator, dtype=torch.float64)
    load = list(range(1, 11))
    method = HCSMoE(feature=feature, linkage=linkage)
    found = groups(method, inputs(made, load), 4)
    order = torch.randperm(10, generator=generator)
    moved = groups(method, inputs(made[order], [load[e] for e in order]), 4)
    assert {frozenset(order[list(group)].tolist()) for group in moved} == found
    assert groups(method, inputs(made * 7.3, load), 4) == found
    assert groups(method, inputs(made + torch.randn(4, generator=generator, dtype=torch.float64), load), 4) == found


@pytest.mark.parametrize("linkage", ["average", "single", "complete", "ward"])
def test_clusters_for_fewer_experts_are_those_for_more_with_one_pair_joined(linkage: str) -> None:
    made = torch.randn(9, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    method, seen = HCSMoE(linkage=linkage), inputs(made, range(1, 10))
    for keep in range(2, 9):
        more, fewer = groups(method, seen, keep), groups(method, seen, keep - 1)
        gone, (made_of,) = more - fewer, fewer - more
        assert len(gone) == 2
        assert frozenset().union(*gone) == made_of


def test_experts_that_are_alike_merge_to_what_each_is() -> None:
    weights = scalar((7, 2, 7, 3, 7, 5)).map(lambda t: t * 0.1)
    features = FEATURES_EH.clone()
    features[2] = features[4] = features[0]
    seen = inputs(steady(features))
    outcome = decide(HCSMoE(), seen, 4)
    assert (0, 2, 4) in (outcome.sources or ())
    merged = HCSMoE().transform(weights, outcome, seen)
    torch.testing.assert_close(merged.up_EIH[outcome.keep.index(0)], weights.up_EIH[0])


def test_keeping_all_copies_every_expert() -> None:
    seen, weights = inputs(steady(FEATURES_EH)), scalar((1, 2, 4, 3, 9, 5))
    outcome = decide(HCSMoE(), seen, 6)
    assert outcome.unchanged(6)
    assert torch.equal(HCSMoE().transform(weights, outcome, seen).up_EIH, weights.up_EIH)


def test_protected_experts_stay_alone_whomever_they_resemble() -> None:
    # Of 0, 2, 3 and 5: 0 and 2 are 1.562 apart, they and 3 (7.071 + 5.517) / 2 = 6.294, 3 and 5 6.403.
    seen = inputs(steady(FEATURES_EH), protected=(1, 4))
    outcome = decide(HCSMoE(), seen, 4)
    assert outcome.keep == (1, 3, 4, 5)
    assert outcome.sources == ((1,), (0, 2, 3), (4,), (5,))


def test_unknown_linkages_are_refused() -> None:
    with pytest.raises(ValidationError):
        HCSMoE(linkage="hirarchical")


def test_what_is_measured_follows_the_feature() -> None:
    assert of(HCSMoE).needs == HCSMoE().required == ("load", "all_output_sum")
    assert HCSMoE(feature="rms").required == ("load", "all_output_gram")


@pytest.mark.parametrize("feature", ["mean", "rms"])
def test_damage_is_named_and_no_tokens_are_none(feature: str) -> None:
    broken = steady(FEATURES_EH).clone()
    broken[4, 1, 0] = float("inf")
    with pytest.raises(NumericFault) as caught:
        decide(HCSMoE(feature=feature), inputs(broken, number=2), 3)
    assert "layer 2, expert 4" in str(caught.value)
    empty = decide(HCSMoE(feature=feature), inputs(steady(FEATURES_EH, 0), (0,) * 6), 3)
    assert sorted(e for group in empty.sources or () for e in group) == list(range(6))
