"""Linkages against clusters worked by hand, their own definitions, and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from moekit.compress.maths.clustering.agglomerative import Dendrogram, Linkage, agglomerate
from moekit.errors import NumericFault

LINE = torch.tensor([0.0, 1.0, 2.2, 10.0, 10.5], dtype=torch.float64)
LINE_DISTANCES = (LINE[:, None] - LINE[None]).abs()


def complete_linkage(distance_NN: torch.Tensor) -> Dendrogram:
    return agglomerate(distance_NN, "complete")


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, ((0,), (1,), (2,), (3,), (4,))),
        (0.6, ((0,), (1,), (2,), (3, 4))),
        (1.1, ((0, 1), (2,), (3, 4))),
        (1.3, ((0, 1), (2,), (3, 4))),  # single linkage would chain 0-1-2 here
        (2.0, ((0, 1), (2,), (3, 4))),
        (2.3, ((0, 1, 2), (3, 4))),
        (11.0, ((0, 1, 2, 3, 4),)),
    ],
)
def test_points_on_a_line_by_hand(threshold: float, expected: tuple[tuple[int, ...], ...]) -> None:
    tree = complete_linkage(LINE_DISTANCES)
    assert tree.below(threshold) == expected
    assert tree.leaving(len(expected)) == expected


def test_threshold_is_exclusive_even_at_zero() -> None:
    tree = complete_linkage(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    assert tree.below(0.0) == ((0,), (1,))
    assert tree.below(1e-300) == ((0, 1),)


def test_of_equal_distances_the_lowest_items_meet_first() -> None:
    assert complete_linkage(torch.ones(4, 4)).joins == ((0, 1), (0, 2), (0, 3))
    # 1-2 and 0-3 are equally close; 0-3 has the lower member.
    gap = torch.full((4, 4), 5.0)
    gap[1, 2] = gap[2, 1] = gap[0, 3] = gap[3, 0] = 1.0
    assert complete_linkage(gap).joins == ((0, 3), (1, 2), (0, 1))


def test_infinite_distance_keeps_apart() -> None:
    gap = LINE_DISTANCES.clone()
    gap[0] = gap[:, 0] = float("inf")
    tree = complete_linkage(gap)
    assert tree.leaving(1) == tree.below(1e9) == ((0,), (1, 2, 3, 4))


def test_one_item_and_bad_distances() -> None:
    assert complete_linkage(torch.zeros(1, 1)).leaving(1) == ((0,),)
    for bad in ("nan", "-inf"):
        with pytest.raises(NumericFault):
            complete_linkage(torch.tensor([[0.0, float(bad)], [float(bad), 0.0]]))


def test_negative_distances_are_ordered_too() -> None:
    gap = torch.tensor([[0.0, -3.0, -0.75], [-3.0, 0.0, -0.75], [-0.75, -0.75, 0.0]])
    assert complete_linkage(gap).heights == (-3.0, -0.75)


cases = st.tuples(st.integers(2, 14), st.integers(0, 2**31))


def distances(items: int, seed: int) -> torch.Tensor:
    gap = torch.rand(items, items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (gap + gap.T).fill_diagonal_(0.0)


@settings(max_examples=50, deadline=None)
@given(case=cases)
def test_agrees_with_scipy(case: tuple[int, int]) -> None:
    gap = distances(*case)
    tree, theirs = complete_linkage(gap), hierarchy.linkage(squareform(gap.numpy()), "complete")
    assert tree.heights == pytest.approx(np.sort(theirs[:, 2]).tolist())
    for threshold in [*tree.heights, 0.7]:
        labels = hierarchy.fcluster(theirs, threshold - 1e-12, "distance")
        expected = {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels)}
        assert {frozenset(cluster) for cluster in tree.below(threshold)} == expected


@settings(max_examples=50, deadline=None)
@given(case=cases)
def test_pairs_within_a_cluster_are_below_the_threshold_and_counts_fall(case: tuple[int, int]) -> None:
    gap = distances(*case)
    tree = complete_linkage(gap)
    previous = case[0]
    for threshold in torch.linspace(0, 2.1, 15).tolist():
        clusters = tree.below(threshold)
        assert sorted(itertools.chain(*clusters)) == list(range(case[0]))
        for cluster in clusters:
            assert all(float(gap[i, j]) < threshold for i, j in itertools.combinations(cluster, 2))
        # No further join is possible: any two clusters hold a pair that is too far apart.
        for one, other in itertools.combinations(clusters, 2):
            assert max(float(gap[i, j]) for i in one for j in other) >= threshold
        assert len(clusters) <= previous
        previous = len(clusters)
    assert previous == 1


# Six points in the plane; joins at 1.0 {0,1}, (1.562050 + 1.2) / 2 {0,1,2}, 1.5 {3,4}, then 6.910708 {0..4}, 7.824958.
POINTS = torch.tensor([[0, 0], [1, 0], [1, 1.2], [5, 5], [5, 6.5], [9, 0]], dtype=torch.float64)
POINT_DISTANCES = torch.cdist(POINTS, POINTS)
BY_HAND = {
    4: ((0, 1, 2), (3,), (4,), (5,)),
    3: ((0, 1, 2), (3, 4), (5,)),
    2: ((0, 1, 2, 3, 4), (5,)),
}


def test_average_linkage_by_hand() -> None:
    tree = agglomerate(POINT_DISTANCES, "average")
    assert tree.heights == pytest.approx((1.0, 1.381025, 1.5, 6.910708, 7.824958), abs=1e-6)
    assert {count: tree.leaving(count) for count in BY_HAND} == BY_HAND


@pytest.mark.parametrize(
    ("linkage", "two"),
    [
        ("single", ((0, 1, 2, 3, 4), (5,))),
        ("complete", ((0, 1, 2), (3, 4, 5))),
        ("ward", ((0, 1, 2), (3, 4, 5))),
    ],
)
def test_the_other_linkages_by_hand(linkage: Linkage, two: tuple[tuple[int, ...], ...]) -> None:
    tree = agglomerate(POINT_DISTANCES, linkage)
    assert tree.joins[0] == (0, 1), "the closest pair, not the farthest"
    assert tree.leaving(3) == BY_HAND[3]
    assert tree.leaving(2) == two


def between(linkage: Linkage, points: torch.Tensor, one: list[int], other: list[int]) -> float:
    """How far apart two clusters are, by definition."""
    pairs = torch.cdist(points[one], points[other])
    if linkage == "ward":
        both = points[[*one, *other]]
        growth = sum(
            sign * float((group - group.mean(0)).square().sum())
            for sign, group in ((1, both), (-1, points[one]), (-1, points[other]))
        )
        return float((2 * growth) ** 0.5)
    return float({"average": pairs.mean(), "single": pairs.min(), "complete": pairs.max()}[linkage])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), linkage=st.sampled_from(["average", "single", "complete", "ward"]))
def test_each_join_is_that_of_the_closest_clusters(seed: int, linkage: Linkage) -> None:
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tree = agglomerate(torch.cdist(points, points), linkage)
    for count, (joined, height) in enumerate(zip(tree.joins, tree.heights, strict=True)):
        clusters = [list(c) for c in tree.after(count)]
        gaps = {(a[0], b[0]): between(linkage, points, a, b) for a, b in itertools.combinations(clusters, 2)}
        assert height == pytest.approx(min(gaps.values()))
        assert gaps[joined] == pytest.approx(height)


@pytest.mark.parametrize("linkage", ["average", "ward"])
def test_means_of_infinite_distances_are_refused(linkage: Linkage) -> None:
    with pytest.raises(NumericFault):
        agglomerate(torch.tensor([[0.0, float("inf")], [float("inf"), 0.0]]), linkage)
