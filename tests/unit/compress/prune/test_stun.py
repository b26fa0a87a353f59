"""STUN's expert stage against clusters and representatives worked by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from pydantic import ValidationError

from moekit.anatomy import Geometry, find_moe_layers
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.maths.clustering.agglomerative import agglomerate
from moekit.compress.prune.stun import Stun, nearest_to_mean, normalised_coactivation
from moekit.compress.weights import LayerWeights, from_live
from moekit.errors import NumericFault
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import resolve
from tests.families import FAMILIES, build

LINE = (0.0, 1.0, 2.2, 10.0, 10.5)


def layer(rows: Iterable[float], hidden: int = 4, width: int = 3, seed: int = 0) -> LayerWeights:
    """Random experts under router rows that lie on a line."""
    generator = torch.Generator().manual_seed(seed)
    router_EH = torch.zeros(len(tuple(rows)), hidden)
    router_EH[:, 0] = torch.tensor(tuple(rows))
    experts = len(router_EH)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return LayerWeights(
        up_EIH=draw(experts, width, hidden),
        down_EHI=draw(experts, hidden, width),
        gate_EIH=draw(experts, width, hidden),
        router={"weight": router_EH, "bias": draw(experts)},
    )


def inputs(weights: LayerWeights, number: int = 0, *, protected: Iterable[int] = (), **values: object) -> LayerInputs:
    experts, hidden = weights.experts, weights.hidden
    tensors = {name: torch.as_tensor(value) for name, value in values.items()}
    stats = LayerStatistics(experts, hidden, values=tensors, width=weights.width)
    geometry = Geometry(hidden, experts, 2, weights.width, 0, True, False, False, True)
    return LayerInputs(number, geometry, stats, lambda: weights, protected=frozenset(protected))


def decide(method: Stun, seen: LayerInputs, keep: int):
    return method.decide(seen, method.score(seen), keep)


def same(first: LayerWeights, second: LayerWeights) -> bool:
    tensors = [
        [w.up_EIH, w.down_EHI, *([] if w.gate_EIH is None else [w.gate_EIH]), *w.router.values()]
        for w in (first, second)
    ]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


NEAREST = Stun(representative="nearest")


def test_the_line_of_router_rows_by_hand() -> None:
    seen = inputs(layer(LINE))
    tree = NEAREST.dendrogram(seen)
    assert tree.below(0.6) == ((0,), (1,), (2,), (3, 4))
    assert tree.below(1.1) == tree.below(1.3) == tree.below(2.0) == ((0, 1), (2,), (3, 4))
    assert tree.below(2.3) == ((0, 1, 2), (3, 4))
    assert set(decide(NEAREST, seen, 3).sources or ()) == {(0, 1), (2,), (3, 4)}
    assert decide(NEAREST, seen, 3).figures["joined_at"] == pytest.approx(1.0)


def test_the_nearest_to_the_mean_by_hand() -> None:
    # theta = (1,0), (0,1), (1,1): the mean is (2/3, 2/3), the distances .745, .745, .471.
    weights = LayerWeights(
        up_EIH=torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1), down_EHI=torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)
    )
    assert nearest_to_mean(weights, (0, 1, 2)) == 2
    assert nearest_to_mean(weights, (0, 1)) == 0


def test_the_largest_gated_output_stays_by_default() -> None:
    seen = inputs(layer(LINE), gated_output_norm=[3.0, 5.0, 1.0, 2.0, 2.0])
    outcome = decide(Stun(), seen, 3)
    assert outcome.keep == (1, 2, 3)  # 3 and 4 are equal: the lower number stays
    assert outcome.sources == ((0, 1), (2,), (3, 4))
    assert outcome.shares == ((0.0, 1.0), (1.0,), (1.0, 0.0))


def test_statistics_asked_for_follow_the_knobs() -> None:
    assert NEAREST.required == ()
    assert Stun().required == ("load", "gated_output_norm")
    assert Stun(coactivation=0.5).required == ("coactivation", "load", "gated_output_norm")
    assert Stun(representative="nearest", router_distance=0, coactivation=1).required == ("coactivation",)
    assert resolve(Stun(coactivation=0.5).required)
    with pytest.raises(KeyError):
        decide(Stun(), inputs(layer(LINE)), 3)
    with pytest.raises(ValidationError, match="nothing tells experts apart"):
        Stun(router_distance=0)


def test_keeping_all_experts_keeps_all_bits() -> None:
    weights = layer(LINE)
    seen = inputs(weights)
    for method in (NEAREST, Stun(representative="nearest", reconstruct=True, kappa=9)):
        outcome = decide(method, seen, 5)
        assert outcome.sources == ((0,), (1,), (2,), (3,), (4,))
        assert same(method.transform(weights, outcome, seen), weights)


def test_without_means_the_representatives_stay_bit_for_bit() -> None:
    weights = layer(LINE)
    seen = inputs(weights)
    outcome = decide(NEAREST, seen, 2)
    assert outcome.merges
    assert same(NEAREST.transform(weights, outcome, seen), weights.select(outcome.keep))


def test_means_only_where_the_layer_has_fewer_than_kappa_clusters() -> None:
    weights = layer(LINE)
    seen = inputs(weights)
    method = Stun(representative="nearest", reconstruct=True)
    # Three clusters, of 2, 1 and 2 members: the number of clusters counts, not of members.
    three = decide(method, seen, 3)
    assert same(method.transform(weights, three, seen), weights.select(three.keep))
    two = decide(method, seen, 2)
    assert two.sources == ((0, 1, 2), (3, 4))
    assert two.shares == (pytest.approx((1 / 3,) * 3), (0.5, 0.5))
    merged = method.transform(weights, two, seen)
    for name in ("up_EIH", "gate_EIH", "down_EHI"):
        expected = torch.stack([getattr(weights, name)[:3].mean(0), getattr(weights, name)[3:].mean(0)])
        torch.testing.assert_close(getattr(merged, name), expected)
    for name, tensor in weights.router.items():
        torch.testing.assert_close(merged.router[name], torch.stack([tensor[:3].mean(0), tensor[3:].mean(0)]))
    assert same(
        NEAREST.transform(weights, decide(NEAREST, seen, 2), seen), weights.select(decide(NEAREST, seen, 2).keep)
    )


@pytest.mark.parametrize(
    "method",
    [Stun(), NEAREST, Stun(coactivation=1.0), Stun(router_distance=0, coactivation=1, representative="nearest")],
)
def test_copies_always_fall_together(method: Stun) -> None:
    weights = layer((*LINE, 1.0)).map(lambda t: t.index_copy(0, torch.tensor([5]), t[1:2]))
    counts = torch.ones(6, 6)
    counts[2, 4] = counts[4, 2] = 1000.0  # a popular pair may not go before the copies
    for keep in range(1, 6):
        seen = inputs(weights, gated_output_norm=torch.arange(6.0), coactivation=counts)
        outcome = decide(method, seen, keep)
        assert any({1, 5} <= set(group) for group in outcome.sources or ()), keep
        if keep == 5:
            assert same(method.transform(weights, outcome, seen), weights.select(outcome.keep))
            assert set(outcome.keep) | {1, 5} == set(range(6))


def test_coactivation_by_hand() -> None:
    counts = torch.tensor([[9, 4, 1], [4, 9, 1], [1, 1, 2]])
    expected = torch.tensor([[0.0, 3.0, 0.75], [3.0, 0.0, 0.75], [0.75, 0.75, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(normalised_coactivation(counts), expected)  # the mean of all nine is 12 / 9
    assert normalised_coactivation(torch.zeros(3, 3)).tolist() == torch.zeros(3, 3).tolist()
    seen = inputs(layer((0.0, 5.0, 5.5)), coactivation=counts)
    alone = Stun(router_distance=0, coactivation=1, representative="nearest")
    torch.testing.assert_close(alone.distances(seen), -expected)
    assert set(decide(alone, seen, 2).sources or ()) == {(0, 1), (2,)}
    mixed = Stun(coactivation=2, representative="nearest")
    # d01 = 5 - 6, d02 = 5.5 - 1.5, d12 = .5 - 1.5: the last two would chain, complete linkage looks at both.
    assert mixed.distances(seen)[0].tolist() == pytest.approx([0, -1, 4])
    assert set(decide(mixed, seen, 2).sources or ()) == {(0, 1), (2,)}


def test_protected_experts_stand_alone() -> None:
    seen = inputs(layer(LINE), protected=[3, 0], gated_output_norm=[0.1, 5.0, 6.0, 0.1, 7.0])
    outcome = decide(Stun(), seen, 4)
    assert outcome.sources == ((0,), (1, 2), (3,), (4,))
    assert decide(Stun(), seen, 3).keep == (0, 3, 4)  # 1, 2 and 4 can meet
    assert decide(Stun(), seen, 2).sources == ((0,), (3,))  # the rest goes, since the protected never absorb


def test_one_threshold_for_all_layers() -> None:
    """The count of each layer is what some one threshold gives, found here by bisection as the paper does."""
    rows = {0: LINE, 3: (0.0, 0.3, 0.7, 1.5, 3.1), 5: (0.0, 20.0, 40.0, 45.0, 100.0)}
    method = NEAREST
    seen = {number: inputs(layer(r), number) for number, r in rows.items()}
    scores = {number: method.score(s) for number, s in seen.items()}
    trees = {
        n: agglomerate((torch.tensor(r)[:, None] - torch.tensor(r)[None]).abs(), "complete") for n, r in rows.items()
    }
    for total in range(3, 16):
        low, high = 0.0, 1000.0
        for _ in range(100):
            middle = (low + high) / 2
            if sum(len(t.below(middle)) for t in trees.values()) > total:
                low = middle
            else:
                high = middle
        expected = {n: len(t.below(high)) for n, t in trees.items()}
        counts = method.share(seen, scores, total, 1, 5)
        assert sum(counts.values()) == total
        if sum(expected.values()) == total:
            assert counts == expected


def test_bounds_of_layers_hold() -> None:
    rows = {0: (0.0, 0.1, 0.2, 0.3), 1: (0.0, 10.0, 20.0, 40.0)}
    seen = {number: inputs(layer(r), number) for number, r in rows.items()}
    scores = {number: NEAREST.score(s) for number, s in seen.items()}
    assert NEAREST.share(seen, scores, 5, 1, 4) == {0: 1, 1: 4}
    assert NEAREST.share(seen, scores, 5, 2, 4) == {0: 2, 1: 3}
    assert NEAREST.share(seen, scores, 5, 1, 3) == {0: 2, 1: 3}
    guarded = {0: dataclasses.replace(seen[0], protected=frozenset(range(4))), 1: seen[1]}
    assert NEAREST.share(guarded, scores, 5, 1, 4) == {0: 4, 1: 1}


def test_no_more_than_one_layer_is_held_while_sharing() -> None:
    seen = {number: inputs(layer(LINE), number) for number in range(2)}
    NEAREST.share(seen, {}, 8, 1, 5)
    assert not any("weights" in vars(s) for s in seen.values())


def test_a_damaged_router_is_named() -> None:
    weights = layer(LINE)
    weights.router["weight"][2, 1] = float("nan")
    with pytest.raises(NumericFault) as caught:
        NEAREST.score(inputs(weights, 7))
    assert (caught.value.layer, caught.value.expert) == (7, 2)


def test_half_precision_means_are_taken_in_full() -> None:
    weights = layer((0.0, 0.1, 0.2)).map(lambda t: t.bfloat16())
    method = Stun(representative="nearest", reconstruct=True)
    seen = inputs(weights)
    merged = method.transform(weights, decide(method, seen, 1), seen)
    assert torch.equal(merged.up_EIH[0], (weights.up_EIH.double().mean(0)).bfloat16())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    block = find_moe_layers(build(family))[-1]
    count = block.geometry.experts
    experts = {n: p for n, p in block.experts.named_parameters(recurse=False) if p.shape[:1] == (count,)}
    assert block.router is not None
    rows = {n: p for n, p in block.router.named_parameters() if p.shape[:1] == (count,)}
    with torch.no_grad():
        weights = from_live(experts, rows, block.geometry).map(torch.clone)
    counts = torch.randint(0, 9, (count, count), generator=torch.Generator().manual_seed(1))
    seen = inputs(weights, gated_output_norm=torch.arange(float(count)), coactivation=counts + counts.T)
    for method in Stun.examples(block.geometry):
        assert isinstance(method, Stun)
        outcome = decide(method, seen, count // 2)
        changed = method.transform(weights, outcome, seen)
        assert sorted(e for group in outcome.sources or () for e in group) == list(range(count))
        assert changed.experts == count // 2
        if not method.reconstruct:
            assert same(changed, weights.select(outcome.keep))
