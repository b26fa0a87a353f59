"""Balanced assignment: equal sizes always, the least cost of all assignments, and nearly so where points are many."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.conversion import balanced_kmeans, kmeans
from moekit.conversion.kmeans import balanced_assignment, capacities, cluster_means, near_assignment


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10_000))
def test_sizes_differ_by_at_most_one(points: int, clusters: int, seed: int) -> None:
    cost = torch.randn(points, clusters, generator=torch.Generator().manual_seed(seed))
    for assign in (balanced_assignment, near_assignment):
        sizes = torch.bincount(assign(cost), minlength=clusters)
        assert sorted(sizes.tolist()) == sorted(capacities(points, clusters).tolist())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 10_000))
def test_no_other_assignment_is_cheaper(points: int, clusters: int, seed: int) -> None:
    cost = torch.randn(points, clusters, generator=torch.Generator().manual_seed(seed)).double()
    sizes = sorted(capacities(points, clusters).tolist())
    least = min(
        float(cost[torch.arange(points), torch.tensor(owner)].sum())
        for owner in itertools.product(range(clusters), repeat=points)
        if [owner.count(e) for e in range(clusters)] == capacities(points, clusters).tolist()
    )
    owner = balanced_assignment(cost)
    assert sorted(torch.bincount(owner, minlength=clusters).tolist()) == sizes
    assert float(cost[torch.arange(points), owner].sum()) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize(("points", "clusters"), [(24, 4), (96, 8), (256, 32)])
def test_the_assignment_of_many_points_is_near_the_least_cost(points: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(points)
    x = torch.randn(points, 12, generator=generator)
    cost = torch.cdist(x, x[:clusters]).square()
    near, best = (
        float(cost[torch.arange(points), assign(cost)].sum()) for assign in (near_assignment, balanced_assignment)
    )
    assert best <= near + 1e-3
    assert near <= 1.02 * best


def test_many_points_take_the_near_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(kmeans, "MOST_EXACT", 39)
    assert torch.equal(balanced_assignment(cost), near_assignment(cost))


def test_a_forced_choice_by_hand() -> None:
    # both points prefer cluster 0; the second loses less by leaving it
    cost = torch.tensor([[0.0, 10.0], [1.0, 2.0]])
    assert balanced_assignment(cost).tolist() == [0, 1]


def test_equal_costs_are_no_trouble() -> None:
    assert torch.bincount(balanced_assignment(torch.zeros(12, 4))).tolist() == [3, 3, 3, 3]


def test_planted_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(6)
    label = torch.arange(6).repeat(20)[torch.randperm(120, generator=generator)]
    x = centres[label] + 0.3 * torch.randn(120, 6, generator=generator)
    owner, centroid = balanced_kmeans(x, 6, generator)
    assert len({(int(a), int(b)) for a, b in zip(owner, label, strict=True)}) == 6
    assert torch.allclose(centroid, cluster_means(x, owner, 6))
    assert torch.bincount(owner).tolist() == [20] * 6


def test_the_same_seed_gives_the_same_clusters() -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    first, again = (balanced_kmeans(x, 8, torch.Generator().manual_seed(2))[0] for _ in range(2))
    assert torch.equal(first, again)
