"""K-means of points of which only the inner products are known, in fp64.

Of experts' outputs, token by token scaled to norm 1, the mean cosines are such products: distances to the mean of a
cluster follow from them, and no output is ever stored.

Legend: N points, P clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import NumericFault

_ROUNDS = 100
# A point changes its cluster only for one that is nearer by more than rounding.
_TIE = 1e-12


@dataclass(frozen=True)
class KernelClusters:
    """What k-means found.

    Attributes:
        groups: points of each cluster, ascending, ordered by smallest point.
        cost: sum over points of the squared distance to the mean of their cluster.
    """

    groups: tuple[tuple[int, ...], ...]
    cost: float


def kernel_kmeans(
    products_NN: Tensor, clusters: int, generator: torch.Generator, *, starts: int = 10
) -> KernelClusters:
    """Cluster points by their inner products: k-means++ starts, then Lloyd's rounds until nothing moves.

    The squared distance of point i to the mean of cluster C is K_ii - 2 mean_{j in C} K_ij + mean_{j, l in C} K_jl. A
    cluster that loses its last point gets the point that is farthest from the mean of its own. Ties go to the cluster
    where a point is, then to the lower one.

    Args:
        products_NN: inner products K, symmetric.
        clusters: P, from 1 to N.
        generator: draws the starts.
        starts: how often; the lowest cost wins, of equal ones the first.

    Raises:
        NumericFault: a product is NaN or infinite.
    """
    kernel_NN = products_NN.detach().double().cpu()
    kernel_NN = (kernel_NN + kernel_NN.T) / 2
    if not bool(kernel_NN.isfinite().all()):
        raise NumericFault("outputs of experts hold NaN or infinity", hint="look at the weights: `moekit check`")
    if clusters >= len(kernel_NN):
        return KernelClusters(tuple((point,) for point in range(len(kernel_NN))), 0.0)
    best: tuple[float, Tensor] | None = None
    for _ in range(starts):
        labels_N, cost = _lloyd(kernel_NN, _plus_plus(kernel_NN, clusters, generator), clusters)
        if best is None or cost < best[0] - _TIE:
            best = (cost, labels_N)
    assert best is not None
    cost, labels_N = best
    members = [(labels_N == cluster).nonzero().flatten().tolist() for cluster in range(clusters)]
    return KernelClusters(tuple(tuple(group) for group in sorted(members)), cost)


def spread(products_NN: Tensor, groups: tuple[tuple[int, ...], ...]) -> float:
    """Sum over points of the squared distance to the mean of their group: what k-means makes small.

    Args:
        products_NN: inner products.
        groups: points of each group.
    """
    kernel_NN = products_NN.detach().double().cpu()
    total = 0.0
    for group in groups:
        inner_MM = kernel_NN[list(group)][:, list(group)]
        total += float(inner_MM.trace() - inner_MM.sum() / len(group))
    return total


def _plus_plus(kernel_NN: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Points to start from (k-means++): each new one drawn by its squared distance to the nearest so far."""
    square_N, points = kernel_NN.diagonal(), len(kernel_NN)
    chosen = [int(torch.randint(points, (1,), generator=generator))]
    nearest_N = torch.full((points,), float("inf"), dtype=torch.float64)
    while len(chosen) < clusters:
        last = chosen[-1]
        nearest_N = torch.minimum(nearest_N, (square_N + square_N[last] - 2 * kernel_NN[last]).clamp_min(0))
        nearest_N[chosen] = 0
        if float(nearest_N.sum()) > 0:
            chosen.append(int(torch.multinomial(nearest_N, 1, generator=generator)))
        else:  # copies of those chosen are all there is
            chosen.append(next(point for point in range(points) if point not in chosen))
    return torch.tensor(chosen)


def _lloyd(kernel_NN: Tensor, start_P: Tensor, clusters: int) -> tuple[Tensor, float]:
    square_N, here = kernel_NN.diagonal(), torch.arange(len(kernel_NN))
    distance_NP = square_N[:, None] + square_N[start_P] - 2 * kernel_NN[:, start_P]
    distance_NP[start_P, torch.arange(clusters)] = -1.0  # a start begins its own cluster, beside whatever copies
    labels_N = distance_NP.argmin(1)
    for _ in range(_ROUNDS):
        _fill(labels_N, kernel_NN, clusters)
        distance_NP = _distances(kernel_NN, labels_N, clusters)
        found_N = distance_NP.argmin(1)
        nearer_N = distance_NP[here, found_N] < distance_NP[here, labels_N] - _TIE
        if not bool(nearer_N.any()):
            break
        labels_N = torch.where(nearer_N, found_N, labels_N)
    _fill(labels_N, kernel_NN, clusters)
    return labels_N, float(_distances(kernel_NN, labels_N, clusters)[here, labels_N].sum())


def _distances(kernel_NN: Tensor, labels_N: Tensor, clusters: int) -> Tensor:
    """Squared distances to the means of all clusters, none of them empty, [N, P]."""
    member_NP = torch.nn.functional.one_hot(labels_N, clusters).double()
    member_NP = member_NP / member_NP.sum(0)
    towards_NP = kernel_NN @ member_NP
    return kernel_NN.diagonal()[:, None] - 2 * towards_NP + (member_NP * towards_NP).sum(0)


def _fill(labels_N: Tensor, kernel_NN: Tensor, clusters: int) -> None:
    """Give each empty cluster the point that is farthest from the mean of its own, in place."""
    sizes_P = torch.bincount(labels_N, minlength=clusters)
    for empty in (sizes_P == 0).nonzero().flatten().tolist():
        used = torch.tensor(sorted(set(labels_N.tolist())))
        dense_N = torch.searchsorted(used, labels_N)
        own_N = _distances(kernel_NN, dense_N, len(used))[torch.arange(len(labels_N)), dense_N]
        own_N[torch.bincount(labels_N, minlength=clusters)[labels_N] == 1] = -1.0
        labels_N[int(own_N.argmax())] = empty
