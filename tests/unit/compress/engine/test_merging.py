"""What all merging methods share: what a group stands on, what goes into it, and what becomes of the router."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import make
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.merging import Groups, MergeMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics

LOAD = (4, 0, 1, 3, 2)


class Pairs(MergeMethod):
    """First with last, and so on inwards, whatever the count; the middle one is alone."""

    def score(self, inputs: LayerInputs) -> Tensor:
        return inputs.statistics.load_E.double()

    def groups(self, inputs: LayerInputs, scores_E: Tensor, count: int, experts: Sequence[int]) -> Groups:
        return [sorted({experts[n], experts[-1 - n]}) for n in range(count)]


def layer(load: tuple[int, ...] = LOAD, protected: tuple[int, ...] = ()) -> LayerInputs:
    experts = len(load)
    geometry = Geometry(3, experts, 1, 2, 0, True, False, False, True)
    statistics = LayerStatistics(experts, 3, (), sum(load), {"load": torch.tensor(load)})
    return LayerInputs(5, geometry, statistics, protected=frozenset(protected))


def weights() -> LayerWeights:
    g = torch.Generator().manual_seed(0)
    return LayerWeights(
        torch.randn(5, 2, 3, generator=g),
        torch.randn(5, 3, 2, generator=g),
        torch.randn(5, 2, 3, generator=g),
        router={"gate.weight": torch.randn(5, 3, generator=g)},
    )


def decided(method: MergeMethod, inputs: LayerInputs, keep: int) -> LayerOutcome:
    return method.decide(inputs, method.score(inputs), keep)


def test_a_group_stands_on_its_most_valuable_member_and_shares_follow_the_scores() -> None:
    made = decided(Pairs(), layer(), 3)
    assert made.keep == (0, 2, 3)
    assert made.sources == ((0, 4), (2,), (1, 3))
    assert made.shares == (pytest.approx((2 / 3, 1 / 3)), (1.0,), (0.0, 1.0))
    assert made.figures == {"largest_group": 2.0, "alone": 1.0, "own_share": pytest.approx((2 / 3 + 1) / 2)}
    equal = decided(Pairs(weigh="equal"), layer(), 3)
    assert equal.keep == made.keep
    assert equal.shares == ((0.5, 0.5), (1.0,), (0.5, 0.5))


def test_protected_experts_stay_alone_and_nothing_is_merged_into_them() -> None:
    made = decided(Pairs(), layer(protected=(1, 4)), 4)
    assert made.keep == (0, 1, 2, 4)
    assert made.sources == ((0, 3), (1,), (2,), (4,))
    assert decided(Pairs(), layer(protected=(1, 4)), 2).keep == (1, 4)
    with pytest.raises(BadConfig, match="2 experts are protected, but only 1 may stay"):
        decided(Pairs(), layer(protected=(1, 4)), 1)


def test_all_experts_stay_as_they_are() -> None:
    made = decided(Pairs(), layer(), 5)
    assert made.unchanged(5)
    result = Pairs().transform(weights(), made, layer())
    assert torch.equal(result.up_EIH, weights().up_EIH)


@pytest.mark.parametrize("align", ["none", "weights"])
def test_merged_weights_are_the_shares_of_the_members(align: str) -> None:
    method, before = Pairs(align=align), weights()
    if align == "weights":  # the last is the first with its neurons the other way round, and a little louder
        for stack in (before.up_EIH, before.gate_EIH):
            assert stack is not None
            stack[4] = 1.1 * stack[0].flip(0)
        before.down_EHI[4] = 1.1 * before.down_EHI[0].flip(1)
    result = method.transform(before, decided(method, layer(), 3), layer())
    if align == "weights":
        expected = (2 / 3 + 1.1 / 3) * before.up_EIH[0]
    else:
        expected = 2 / 3 * before.up_EIH[0] + 1 / 3 * before.up_EIH[4]
    torch.testing.assert_close(result.up_EIH[0], expected)
    assert torch.equal(result.up_EIH[1], before.up_EIH[2])
    assert torch.equal(result.up_EIH[2], before.up_EIH[3]), "who counts for nothing leaves no trace"
    assert torch.equal(result.router["gate.weight"], before.router["gate.weight"][[0, 2, 3]])
    mean = Pairs(align=align, router="mean").transform(before, decided(method, layer(), 3), layer())
    rows = before.router["gate.weight"]
    torch.testing.assert_close(mean.router["gate.weight"][0], 2 / 3 * rows[0] + 1 / 3 * rows[4])


def test_random_groups_are_a_partition_that_the_seed_decides() -> None:
    method = make("merge", "random-groups", {})
    load = tuple(range(1, 33))
    made = [decided(method, LayerInputs(5, layer(load).geometry, layer(load).statistics, seed=s), 7) for s in (0, 0, 1)]
    for outcome in made:
        assert outcome.sources is not None
        assert sorted(e for group in outcome.sources for e in group) == list(range(32))
        assert all(kept == max(group) for kept, group in zip(outcome.keep, outcome.sources, strict=True))
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Pairs(), "count for nothing beside members that were chosen, and 0 of them stand for a group"),
        (Pairs(weigh="equal"), "count like the other members of their groups, and 0 of them stand for a group"),
        (make("merge", "ream", {}), "count as little as the least of those that were chosen, and 0 of them stand"),
        (make("merge", "ream", {"weigh": "equal"}), "count like the other members of their groups"),
        (make("merge", "ream", {"merge": False}), "rank below all others, and 0 of them stay"),
    ],
)
def test_what_is_said_of_experts_that_no_token_chose_is_what_becomes_of_them(method: MergeMethod, told: str) -> None:
    assert told in method.unseen((1,), decided(Pairs(), layer(), 3))
