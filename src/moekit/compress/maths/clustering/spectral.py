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
    gram = _symmetric(gram_EE)
    if kind == "rbf":
        return _rbf(gram)
    square = gram.diagonal().copy()
    if kind == "pearson":
        sums = sum_E.detach().double().cpu().numpy()
        gram = gram - np.outer(sums, sums) / max(tokens, 1)
        # What cancellation leaves of a constant column is rounding, not variance.
        square = np.where(gram.diagonal() > 1e-12 * square, gram.diagonal(), 0.0)
    return _scaled(gram, square)


def cosines(gram_EE: Tensor) -> Array:
    """Cosines of vectors by their inner products, [E, E] in [-1, 1], symmetric; 0 where a vector is zero.

    Args:
        gram_EE: inner products of all pairs.
    """
    gram = _symmetric(gram_EE)
    return _scaled(gram, gram.diagonal())


def _symmetric(gram_EE: Tensor) -> Array:
    gram: Array = gram_EE.detach().double().cpu().numpy()
    return (gram + gram.T) / 2


def _scaled(gram: Array, square: Array) -> Array:
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
    """Rows of the Laplacian's eigenvectors of the P smallest eigenvalues, each of length 1 (0 stays 0): [E, P].

    `sklearn.cluster.SpectralClustering` divides rows by the root of their degree instead, which is another algorithm
    (Shi and Malik) than that of Ng, Jordan and Weiss.
    """
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
        labels[connected] = kmeans(points, inner, restarts, seed)
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


def kmeans(points_ED: Array, clusters: int, restarts: int, seed: int) -> Labels:
    """K-means with k-means++ starts: the run of the least squared distance, without empty clusters.

    Where there are fewer different points than clusters, equal points share the clusters that would stay empty.

    Args:
        points_ED: what is clustered.
        clusters: P, at most E.
        restarts: runs, of which the best is kept.
        seed: of the starts.
    """
    from sklearn.cluster import KMeans

    different = min(clusters, len(np.unique(points_ED, axis=0)))
    found = KMeans(different, n_init=restarts, max_iter=_LLOYD_ROUNDS, tol=0.0, random_state=seed).fit(points_ED)
    labels: Labels = found.labels_.astype(np.int64)
    for empty in range(different, clusters):
        labels[np.flatnonzero(labels == np.bincount(labels).argmax())[-1]] = empty
    return labels
