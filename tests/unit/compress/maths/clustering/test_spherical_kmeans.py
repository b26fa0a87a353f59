"""Spherical k-means against hand-worked centroids and a slow reference in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.compress.maths.clustering.spherical_kmeans import spherical_kmeans, unit
from moekit.errors import NumericFault

# Two neurons of one expert and one of another, as gate | up | down, each of two numbers.
POINTS = torch.tensor([[1.0, 0, 1, 0, 1, 0], [0, 1.5, 0, 1, 0, 1], [2, 0, 1, 0.5, 1, 0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5017361, 0.5017361, 0.1111111], dtype=torch.float64)


def plain(
    points: Tensor, weights: Tensor, start: list[int], rounds: int, rescale: bool
) -> tuple[list[list[float]], list[int]]:
    """The same by loops over lists, always the same number of rounds."""
    x, w = points.double().tolist(), weights.tolist()
    centroids = [x[i] for i in start]
    labels: list[int] = []

    def dot(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    for _ in range(rounds):
        labels = [
            max(range(len(start)), key=lambda j: (dot(p, centroids[j]) / math.hypot(*centroids[j]), -j)) for p in x
        ]
        for j in range(len(start)):
            members = [i for i, label in enumerate(labels) if label == j]
            if not members:
                continue
            norm = sum(math.hypot(*x[i]) for i in members) / len(members)
            total = sum(w[i] for i in members)
            mean = [
                sum(w[i] * norm / math.hypot(*x[i]) * x[i][f] for i in members) / total for f in range(points.shape[1])
            ]
            length = math.hypot(*mean)
            centroids[j] = [value * norm / length for value in mean] if rescale else mean
    return centroids, labels


@pytest.mark.parametrize(
    ("rescale", "merged"),
    [
        (False, [1.3071056, 0, 1.1536488, 0.0767284, 1.1536488, 0]),
        (True, [1.3221533, 0, 1.1669299, 0.0776117, 1.1669299, 0]),
    ],
)
@pytest.mark.parametrize("start", [[2, 1], [0, 1]])
def test_three_segments_by_hand(rescale: bool, merged: list[float], start: list[int]) -> None:
    found = spherical_kmeans(POINTS, WEIGHTS, torch.tensor(start), rescale=rescale)
    assert found.labels_N.tolist() == [0, 1, 0]
    assert found.centroids_IF[0].tolist() == pytest.approx(merged, abs=1e-7)
    assert torch.equal(found.centroids_IF[1], POINTS[1])


def test_norms_and_weights_by_hand() -> None:
    """A cluster's centroid has its members' mean norm, here (sqrt 3 + 2.5) / 2, whatever they weigh."""
    found = spherical_kmeans(POINTS, WEIGHTS, torch.tensor([2, 1]))
    assert float(found.centroids_IF[0].norm()) == pytest.approx(2.1160254, abs=5e-8)
    heavy = spherical_kmeans(POINTS, torch.tensor([1e-9, 1, 1]), torch.tensor([2, 1]))
    torch.testing.assert_close(heavy.centroids_IF[0], POINTS[2] * 2.1160254 / 2.5, atol=1e-7, rtol=0)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_loops_find_the_same(seed: int, rescale: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(40, generator=generator, dtype=torch.float64) + 0.1
    start = torch.randperm(40, generator=generator)[:7]
    centroids, labels = plain(points, weights, start.tolist(), 30, rescale)
    found = spherical_kmeans(points, weights, start, rescale=rescale, tolerance=0.0)
    assert found.labels_N.tolist() == labels
    torch.testing.assert_close(found.centroids_IF, torch.tensor(centroids, dtype=torch.float64))
    single, labels_single = plain(points, weights, start.tolist(), 1, rescale)
    once = spherical_kmeans(points, weights, start, rescale=rescale, iterations=1)
    assert once.rounds == 1
    assert once.labels_N.tolist() == labels_single
    torch.testing.assert_close(once.centroids_IF, torch.tensor(single, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_the_scale_of_weights_do_not_matter(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    points, weights = torch.randn(50, 6, generator=generator).to(dtype), torch.rand(50, generator=generator)
    before = points.clone()
    whole = spherical_kmeans(points, weights, torch.arange(8))
    assert whole.centroids_IF.dtype == torch.float32
    for rows in (1, 7, 50):
        found = spherical_kmeans(points, weights * 1e-4, torch.arange(8), rows=rows)
        assert torch.equal(found.labels_N, whole.labels_N)
        torch.testing.assert_close(found.centroids_IF, whole.centroids_IF)
    assert torch.equal(points, before)


def test_points_without_weight_or_length_change_nothing() -> None:
    extra = torch.tensor([[9.0, 1, 9, 0, 9, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    points, weights = torch.cat([POINTS, extra]), torch.cat([WEIGHTS, torch.tensor([0.0, 0.7])])
    alone = spherical_kmeans(POINTS, WEIGHTS, torch.tensor([2, 1]))
    found = spherical_kmeans(points, weights, torch.tensor([2, 1]))
    assert torch.equal(found.centroids_IF, alone.centroids_IF)


def test_clusters_without_members_keep_their_centroid() -> None:
    """A copy of a centroid wins no point; zero centroids win none either; no weight at all changes nothing."""
    points = torch.tensor([[1.0, 0], [2.0, 0], [0, 1], [0, 0]])
    found = spherical_kmeans(points, torch.ones(4), torch.tensor([0, 1, 2, 3]))
    assert torch.equal(found.centroids_IF, torch.tensor([[1.5, 0], [2.0, 0], [0, 1], [0, 0]]))
    nothing = spherical_kmeans(points, torch.zeros(4), torch.tensor([0, 2]))
    assert torch.equal(nothing.centroids_IF, points[[0, 2]])


def test_members_that_cancel_leave_the_centroid_as_it_was() -> None:
    points = torch.tensor([[1.0, 0], [0, 1.0], [0, -1.0]])
    found = spherical_kmeans(points, torch.tensor([0.0, 1, 1]), torch.tensor([0]))
    assert torch.equal(found.centroids_IF, points[:1])


def test_it_stops_when_centroids_rest() -> None:
    points = torch.cat([torch.eye(4), torch.eye(4) * 3])
    found = spherical_kmeans(points, torch.ones(8), torch.arange(4), iterations=30)
    assert found.rounds == 1
    torch.testing.assert_close(found.centroids_IF, torch.eye(4) * 2)
    loose = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    rounds = [spherical_kmeans(loose, torch.ones(200), torch.arange(9), tolerance=t).rounds for t in (2.0, 1e-2, 0.0)]
    assert rounds == sorted(rounds)
    assert rounds[0] == 1 < rounds[-1]


def test_unit_vectors() -> None:
    found = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]]))
    torch.testing.assert_close(found[0], torch.tensor([0.6, 0.8]))
    assert found[1].tolist() == [0.0, 0.0]
    assert bool(found.isfinite().all())


def test_damaged_points_are_refused() -> None:
    points = POINTS.clone()
    points[1, 2] = float("nan")
    with pytest.raises(NumericFault, match="NaN or infinity"):
        spherical_kmeans(points, WEIGHTS, torch.tensor([0, 1]))
