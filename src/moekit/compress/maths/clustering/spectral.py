"""How alike experts are by their router logits, and spectral clusters of them, all in fp64.

Logits Z [N, E] are never needed themselves: their Gram matrix Z^T Z, column sums and N give every similarity here.

Legend: N tokens, E experts, P clusters.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

Similarity = Literal["cosine", "pearson", "rbf"]
Array: TypeAlias = npt.NDArray[np.float64]
Labels: TypeAlias = npt.NDArray[np.int64]

_LLOYD_ROUNDS = 300


def similarity(gram_EE: Tensor, sum_E: Tensor, tokens: int, kind: Similarity) -> Array:
    """Similarity of the experts' logit columns, [E, E], symmetric; 0 where a column is zero (or, centred, constant).

    "cosine" and "pearson" lie in [-1, 1]; "rbf" is exp(-d^2 / (2 s^2)) of the columns' distances d with s their median,
    in [0, 1]. None changes when all logits are multiplied by a positive number.

    Args:
        gram_EE: Z^T Z.
        sum_E: sums of Z over tokens.
        tokens: N.
        kind: which.
    """
    gram = np.asarray(gram_EE.detach().double().cpu().numpy())
    gram = (gram + gram.T) / 2
    if kind == "rbf":
        return _rbf(gram)
    square = gram.diagonal().copy()
    if kind == "pearson":
        sums = sum_E.detach().double().cpu().numpy()
        gram = gram - np.outer(sums, sums) / max(tokens, 1)
        # What cancellation leaves of a constant column is rounding, not variance.
        square = np.where(gram.diagonal() > 1e-12 * square, gram.diagonal(), 0.0)
    norms = np.sqrt(np.outer(square, square))
    cosine: Array = np.divide(gram, norms, out=np.zeros_like(gram), where=norms > 0)
    bounded: Array = cosine.clip(-1.0, 1.0)
    return bounded


def _rbf(gram: Array) -> Array:
    square = gram.diagonal()
    distance2 = (square[:, None] + square[None, :] - 2 * gram).clip(0.0)
    others = distance2[~np.eye(len(gram), dtype=bool)]
    median2 = float(np.median(others)) if len(others) else 0.0
    if median2 == 0.0:  # most experts have equal columns: alike if equal, else not at all
        return np.asarray(distance2 == 0.0, dtype=np.float64)
    return np.asarray(np.exp(-distance2 / (2 * median2)), dtype=np.float64)


def affinity(similarity_EE: Array) -> Array:
    """Weights of the graph that is clustered: max(similarity, 0), zero diagonal."""
    weights: Array = similarity_EE.clip(0.0)
    np.fill_diagonal(weights, 0.0)
    return weights


def laplacian(affinity_EE: Array) -> Array:
    """Normalised Laplacian I - D^(-1/2) A D^(-1/2), D the row sums; a row without weights is the identity's."""
    degree = affinity_EE.sum(1)
    root = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    scaled: Array = root[:, None] * affinity_EE * root[None, :]
    return np.eye(len(degree)) - scaled


def embedding(affinity_EE: Array, clusters: int) -> Array:
    """Rows of the Laplacian's eigenvectors of the P smallest eigenvalues, each of length 1 (0 stays 0): [E, P]."""
    _, vectors = np.linalg.eigh(laplacian(affinity_EE))
    rows = vectors[:, :clusters]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Array = np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-12)
    return unit


def spectral_clusters(
    similarity_EE: Array, clusters: int, *, importance_E: Array | None = None, restarts: int = 10, seed: int = 0
) -> Labels:
    """Normalised spectral clustering into P non-empty clusters.

    Experts that resemble no other are clusters of their own; where they are too many for that, the less important ones
    join the cluster they resemble most. The clusters do not depend on how experts are numbered, unless their rows of
    similarities are equal.

    Args:
        similarity_EE: from `similarity`.
        clusters: P, 1 to E.
        importance_E: how much an expert is worth a cluster of its own; equal by default.
        restarts: runs of k-means++, of which the best is kept.
        seed: of k-means++.

    Returns:
        Cluster of each expert [E], numbered by their first members.

    Raises:
        ValueError: P is not in [1, E].
    """
    count = len(similarity_EE)
    if not 1 <= clusters <= count:
        raise ValueError(f"{count} experts do not make {clusters} clusters")
    if clusters == count:
        return np.arange(count)
    # Rounded, so that logits of another scale, or experts in another order, give the same numbers to the last bit.
    similarity_EE = np.round(similarity_EE, 9)
    weights = affinity(similarity_EE)
    # Random draws must meet the same expert whatever its number is: order experts by what they are. Experts alone have
    # no positive similarity, but their negative ones tell them apart.
    order = np.lexsort(np.concatenate([np.sort(similarity_EE, axis=1), np.sort(weights, axis=1)], axis=1).T)
    connected = np.array([e for e in order if weights[e].any()], dtype=np.int64)
    alone = [e for e in order if not weights[e].any()]
    if importance_E is not None:
        alone.sort(key=lambda e: -importance_E[e])
    inner = max(clusters - len(alone), 1) if len(connected) else 0
    labels = np.full(count, -1, dtype=np.int64)
    if inner:
        points = embedding(weights[np.ix_(connected, connected)], inner)
        labels[connected] = kmeans(points, inner, restarts, np.random.default_rng(seed))
    for number, expert in enumerate(alone[: clusters - inner]):
        labels[expert] = inner + number
    return renumbered(join_nearest(labels, similarity_EE))


def join_nearest(labels_E: Labels, similarity_EE: Array) -> Labels:
    """Give each expert of label -1 the cluster whose members it resembles most on average; ties go to the lower one."""
    joined = labels_E.copy()
    homeless = np.flatnonzero(labels_E < 0)
    if len(homeless):
        member_EP = labels_E[:, None] == np.arange(labels_E.max() + 1)
        mean_EP = similarity_EE @ member_EP / member_EP.sum(0)
        joined[homeless] = mean_EP[homeless].argmax(1)
    return joined


def renumbered(labels_E: Labels) -> Labels:
    """The same clusters, numbered by their first members."""
    _, first, inverse = np.unique(labels_E, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[first.argsort()] = np.arange(len(first))
    numbered: Labels = rank[inverse]
    return numbered


def kmeans(points_ED: Array, clusters: int, restarts: int, rng: np.random.Generator) -> Labels:
    """K-means with k-means++ starts: the run of the least squared distance, without empty clusters."""
    best, least = np.arange(len(points_ED)) % clusters, np.inf
    for _ in range(restarts):
        labels = _fill_empty(points_ED, _lloyd(points_ED, _plus_plus(points_ED, clusters, rng)), clusters)
        centres = _means(points_ED, labels, clusters)
        inertia = float(np.square(points_ED - centres[labels]).sum())
        # Runs that end in the same clusters differ by rounding.
        if inertia < least - 1e-12:
            best, least = labels, inertia
    return best


def _distances(points: Array, centres: Array) -> Array:
    squares: Array = np.square(points[:, None] - centres[None]).sum(-1)
    return squares


def _means(points: Array, labels: Labels, clusters: int) -> Array:
    member_PE = (labels == np.arange(clusters)[:, None]).astype(np.float64)
    means: Array = member_PE @ points / member_PE.sum(1, keepdims=True).clip(1.0)
    return means


def _plus_plus(points: Array, clusters: int, rng: np.random.Generator) -> Array:
    """Starting centres: far from each other, at random (Arthur and Vassilvitskii, SODA 2007)."""
    chosen = [int(rng.integers(len(points)))]
    for _ in range(clusters - 1):
        nearest = _distances(points, points[chosen]).min(1)
        nearest[chosen] = 0.0
        total = nearest.sum()
        free = np.setdiff1d(np.arange(len(points)), chosen)
        chosen.append(int(rng.choice(len(points), p=nearest / total) if total > 0 else free[0]))
    return np.asarray(points[chosen])


def _lloyd(points: Array, centres: Array) -> Labels:
    labels: Labels = _distances(points, centres).argmin(1)
    for _ in range(_LLOYD_ROUNDS):
        means = _means(points, labels, len(centres))
        filled = np.bincount(labels, minlength=len(centres)) > 0
        centres = np.where(filled[:, None], means, centres)
        moved = _distances(points, centres).argmin(1)
        if np.array_equal(moved, labels):
            break
        labels = moved
    return labels


def _fill_empty(points: Array, labels: Labels, clusters: int) -> Labels:
    """Split the largest cluster for each empty one: its outermost member leaves, with all that are nearer to it."""
    labels = labels.copy()
    for empty in np.flatnonzero(np.bincount(labels, minlength=clusters) == 0):
        members = np.flatnonzero(labels == np.bincount(labels, minlength=clusters).argmax())
        mean = points[members].mean(0, keepdims=True)
        from_mean = _distances(points[members], mean)[:, 0]
        outermost = members[from_mean.argmax()]
        nearer = _distances(points[members], points[[outermost]])[:, 0] < from_mean
        moving = members[nearer] if 0 < nearer.sum() < len(members) else members[members == outermost]
        labels[moving] = empty
    return labels
