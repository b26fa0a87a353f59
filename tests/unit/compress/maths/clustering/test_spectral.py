"""Similarities and spectral clusters against hand-worked numbers and plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.compress.maths.clustering.spectral import (
    Array,
    affinity,
    embedding,
    join_nearest,
    kmeans,
    laplacian,
    renumbered,
    similarity,
    spectral_clusters,
)

LOGITS = np.array(
    [[4, 3, 0, -1], [3, 4, -1, 0], [5, 5, 1, 0], [0, -1, 4, 4], [-1, 0, 3, 5], [0, 1, 5, 3]], dtype=np.float64
)


def of(logits: Array, kind: str = "cosine") -> Array:
    z = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    return similarity(z.T @ z, z.sum(0), len(z), kind)  # type: ignore[arg-type]


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == c).tolist()) for c in set(labels.tolist())}


def planted(sizes: list[int], seed: int, noise: float = 0.3) -> Array:
    """Logits of experts in groups that share a direction."""
    rng = np.random.default_rng(seed)
    columns = [rng.normal(size=40)[:, None] + noise * rng.normal(size=(40, size)) for size in sizes]
    return np.concatenate(columns, axis=1)


def test_cosines_of_four_experts_by_hand() -> None:
    cosine = of(LOGITS)
    expected = {(0, 1): 0.9515012, (2, 3): 0.8932460, (1, 2): 0.0384615}
    for pair, value in expected.items():
        assert cosine[pair] == pytest.approx(value, abs=5e-8)
    weights = affinity(cosine)
    assert all(cosine[pair] < 0 and weights[pair] == 0 for pair in [(0, 2), (0, 3), (1, 3)])
    assert np.array_equal(weights, weights.T)
    assert not weights.diagonal().any()


def test_eigenvalues_vectors_and_clusters_by_hand() -> None:
    weights = affinity(of(LOGITS))
    values, vectors = np.linalg.eigh(laplacian(weights))
    np.testing.assert_allclose(values, [0, 0.0400669, 1.9599331, 2], atol=5e-8)
    rows = np.abs(vectors[:, :2])
    np.testing.assert_allclose(rows, [[0.503, 0.497], [0.513, 0.487], [0.497, 0.503], [0.487, 0.513]], atol=5e-4)
    assert np.array_equal(np.sign(vectors[0, :2]), np.sign(vectors[1, :2]))
    assert np.sign(vectors[0, 1]) != np.sign(vectors[2, 1])
    np.testing.assert_allclose(np.linalg.norm(embedding(weights, 2), axis=1), 1)
    assert spectral_clusters(of(LOGITS), 2).tolist() == [0, 0, 1, 1]


def test_pearson_is_the_correlation() -> None:
    np.testing.assert_allclose(of(LOGITS + 7, "pearson"), np.corrcoef(LOGITS.T), atol=1e-12)


def test_rbf_is_a_kernel_of_the_columns_distances() -> None:
    distance2 = np.square(LOGITS[:, :, None] - LOGITS[:, None, :]).sum(0)
    median2 = np.median(distance2[~np.eye(4, dtype=bool)])
    np.testing.assert_allclose(of(LOGITS, "rbf"), np.exp(-distance2 / (2 * median2)), atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "pearson", "rbf"])
@pytest.mark.parametrize("column", [0.0, 2.0, -0.1])
def test_columns_without_a_direction_are_never_nan(kind: str, column: float) -> None:
    logits = LOGITS.copy()
    logits[:, 2] = column
    alike = of(logits, kind)
    assert np.isfinite(alike).all()
    if kind == "pearson" or (kind == "cosine" and not column):
        assert not alike[2].any()
        assert not alike[:, 2].any()
    assert sorted(set(spectral_clusters(alike, 3).tolist())) == [0, 1, 2]
    assert np.isfinite(of(np.zeros((5, 4)), kind)).all()
    assert similarity(torch.zeros(1, 1), torch.zeros(1), 0, kind).shape == (1, 1)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    clusters=st.integers(1, 8),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["cosine", "pearson", "rbf"]),
    scale=st.sampled_from([0.001, 3.7, 250.0]),
)
def test_clusters_ignore_numbering_and_positive_scale(
    sizes: list[int], clusters: int, seed: int, kind: str, scale: float
) -> None:
    logits = planted(sizes, seed)
    experts = logits.shape[1]
    clusters = min(clusters, experts)
    found = partition(spectral_clusters(of(logits, kind), clusters))
    assert len(found) == clusters
    assert set().union(*found) == set(range(experts))
    order = np.random.default_rng(seed).permutation(experts)
    moved = spectral_clusters(of(logits, kind)[np.ix_(order, order)], clusters)
    assert {frozenset(order[list(c)].tolist()) for c in partition(moved)} == found
    assert partition(spectral_clusters(of(scale * logits, kind), clusters)) == found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["cosine", "pearson", "rbf"])
def test_planted_groups_are_found(kind: str, seed: int) -> None:
    labels = spectral_clusters(of(planted([5, 3, 4], seed), kind), 3, seed=seed)
    assert labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4


def test_the_same_seed_gives_the_same_clusters() -> None:
    alike = of(np.random.default_rng(0).normal(size=(30, 16)))
    runs = {tuple(spectral_clusters(alike, 5, restarts=1, seed=3).tolist()) for _ in range(3)}
    assert len(runs) == 1


def test_an_expert_like_no_other_is_alone() -> None:
    alike = np.array([[1, 0.9, -0.1, 0.2], [0.9, 1, -0.3, 0.3], [-0.1, -0.3, 1, -0.2], [0.2, 0.3, -0.2, 1.0]])
    assert spectral_clusters(alike, 2).tolist() == [0, 0, 1, 0]
    assert spectral_clusters(alike, 3).tolist() == [0, 0, 1, 2]
    # One cluster is left for three that are alike, and none for the fourth: it joins them.
    assert spectral_clusters(alike, 1).tolist() == [0, 0, 0, 0]


def test_too_many_that_are_alone_join_what_they_resemble_most_the_less_important_first() -> None:
    alike = np.array([[1, -0.1, -0.9], [-0.1, 1, -0.5], [-0.9, -0.5, 1.0]])
    assert spectral_clusters(alike, 2, importance_E=np.array([5.0, 1.0, 9.0])).tolist() == [0, 0, 1]
    assert spectral_clusters(alike, 2, importance_E=np.array([5.0, 9.0, 1.0])).tolist() == [0, 1, 1]


def test_homeless_experts_join_the_cluster_they_resemble_most_on_average() -> None:
    alike = np.array([[1, 0.5, 0, 0.9], [0.5, 1, 0, 0.1], [0, 0, 1, 0.6], [0.9, 0.1, 0.6, 1.0]])
    assert join_nearest(np.array([0, 0, 1, -1]), alike).tolist() == [0, 0, 1, 1]  # 0.6 beats (0.9 + 0.1) / 2
    assert renumbered(np.array([3, 0, 3, 1])).tolist() == [0, 1, 0, 2]


def test_equal_points_still_fill_every_cluster() -> None:
    points = np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]])
    labels = kmeans(points, 4, 3, 0)
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]
    assert (labels[:6] != labels[6]).all()


def test_more_clusters_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="4 experts do not make 5 clusters"):
        spectral_clusters(of(LOGITS), 5)
    assert spectral_clusters(of(LOGITS), 4).tolist() == [0, 1, 2, 3]
