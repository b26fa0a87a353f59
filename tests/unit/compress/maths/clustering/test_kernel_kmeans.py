"""K-means of inner products, against the points themselves and against trying every partition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moekit.compress.maths.clustering.kernel_kmeans import kernel_kmeans, spread
from moekit.errors import NumericFault


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cost_of(points_NF: Tensor, labels: tuple[int, ...]) -> float:
    total = 0.0
    for label in set(labels):
        mine_MF = points_NF[[n for n, own in enumerate(labels) if own == label]]
        total += float((mine_MF - mine_MF.mean(0)).square().sum())
    return total


@pytest.mark.parametrize("seed", range(4))
def test_no_partition_costs_less(seed: int) -> None:
    points_NF = torch.randn(6, 3, generator=seeded(seed), dtype=torch.float64)
    found = kernel_kmeans(points_NF @ points_NF.T, 3, seeded(), starts=20)
    every = (labels for labels in itertools.product(range(3), repeat=6) if len(set(labels)) == 3)
    assert found.cost == pytest.approx(min(cost_of(points_NF, labels) for labels in every))
    labels = tuple(next(g for g, group in enumerate(found.groups) if n in group) for n in range(6))
    assert found.cost == pytest.approx(cost_of(points_NF, labels))
    assert spread(points_NF @ points_NF.T, found.groups) == pytest.approx(found.cost)


def test_blobs_are_found_in_whatever_order_their_points_come() -> None:
    centres = torch.eye(4, dtype=torch.float64).repeat_interleave(torch.tensor([5, 1, 2, 4]), dim=0)
    points_NF = centres + 0.05 * torch.randn(12, 4, generator=seeded(), dtype=torch.float64)
    groups = kernel_kmeans(points_NF @ points_NF.T, 4, seeded()).groups
    assert groups == ((0, 1, 2, 3, 4), (5,), (6, 7), (8, 9, 10, 11))
    order = torch.randperm(12, generator=seeded(1))
    moved = points_NF[order]
    found = kernel_kmeans(moved @ moved.T, 4, seeded(2)).groups
    assert {frozenset(order[list(group)].tolist()) for group in found} == set(map(frozenset, groups))


def test_copies_fill_as_many_clusters_as_are_asked_for() -> None:
    found = kernel_kmeans(torch.ones(5, 5), 3, seeded())
    assert sorted(point for group in found.groups for point in group) == list(range(5))
    assert (len(found.groups), found.cost) == (3, pytest.approx(0.0))


def test_ends() -> None:
    kernel = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert kernel_kmeans(kernel, 2, seeded()) == kernel_kmeans(kernel, 9, seeded())
    # ||a - b||^2 = 1: each is half of that root away from the mean.
    assert kernel_kmeans(kernel, 1, seeded()).cost == pytest.approx(0.5)
    with pytest.raises(NumericFault, match="NaN or infinity"):
        kernel_kmeans(torch.full((3, 3), float("nan")), 2, seeded())
