"""Balanced assignment: equal sizes always, costs close to the optimum that the Hungarian method finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moekit.conversion import balanced_kmeans
from moekit.conversion.kmeans import balanced_assignment, capacities, cluster_means


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10_000))
def test_sizes_differ_by_at_most_one(points: int, clusters: int, seed: int) -> None:
    cost = torch.randn(points, clusters, generator=torch.Generator().manual_seed(seed))
    sizes = torch.bincount(balanced_assignment(cost), minlength=clusters)
    assert sorted(sizes.tolist()) == sorted(capacities(points, clusters).tolist())


@pytest.mark.parametrize(("points", "clusters"), [(24, 4), (96, 8), (256, 32)])
def test_cost_is_near_the_optimum(points: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(points)
    x = torch.randn(points, 12, generator=generator)
    cost = torch.cdist(x, x[:clusters]).square()
    owner = balanced_assignment(cost)
    mine = float(cost[torch.arange(points), owner].sum())
    tiled = cost.repeat_interleave(points // clusters, dim=1).numpy()
    rows, columns = linear_sum_assignment(tiled)
    assert mine <= 1.02 * float(tiled[rows, columns].sum())


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
