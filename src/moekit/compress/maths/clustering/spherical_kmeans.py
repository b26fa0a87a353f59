"""Weighted spherical k-means with norm equalisation (DERN, arXiv:2509.10377, eq. 11).

Points are clustered by direction; a cluster's centroid is the weighted mean of its members after each was scaled to
their mean norm, so that a long member does not count more than its weight says.

Legend: N points, I clusters, F numbers of a point, C points of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import NumericFault

# Points at a time: bounds the fp32 copies of points and their similarities to the centroids.
ROWS = 2048
# Members whose weighted mean is shorter than this share of their norm point against each other: there is no direction.
_CANCELLED = 1e-6


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means found.

    Attributes:
        centroids_IF: in fp32 (fp64 where points are).
        labels_N: each point's cluster, int64.
        rounds: times that points were assigned.
    """

    centroids_IF: Tensor
    labels_N: Tensor
    rounds: int


def unit(vectors_NF: Tensor) -> Tensor:
    """Vectors of norm 1; zero vectors stay zero."""
    norm_N1: Tensor = torch.linalg.vector_norm(vectors_NF, dim=-1, keepdim=True)
    return vectors_NF / norm_N1.clamp_min(torch.finfo(vectors_NF.dtype).tiny)


def spherical_kmeans(
    points_NF: Tensor,
    weight_N: Tensor,
    start_I: Tensor,
    *,
    iterations: int = 30,
    tolerance: float = 1e-4,
    rescale: bool = True,
    rows: int = ROWS,
) -> Clusters:
    """Cluster points by cosine, each centroid the weighted mean of its members at their mean norm.

    With members x_i of weights w_i and m their mean norm (unweighted), the centroid is c = m sum_i w_i x_i / ||x_i|| /
    sum_i w_i. A mean of vectors that are not parallel is shorter than they are; `rescale` makes it m c / ||c||. Points
    of weight 0 or norm 0 are assigned but change nothing. A cluster without members, or whose members cancel each
    other, keeps its centroid. A single member is copied bit for bit. Ties go to the lower cluster.

    Args:
        points_NF: the points, any float type; worked on in fp32 (fp64 where they are) a chunk at a time.
        weight_N: their weights, not negative; any scale.
        start_I: numbers of the points that are the first centroids.
        iterations: most rounds, at least 1.
        tolerance: stop when no centroid's direction moves farther than this.
        rescale: give centroids the mean norm of their members.
        rows: points at a time.

    Raises:
        NumericFault: a point holds NaN or infinity.
    """
    wide = torch.promote_types(points_NF.dtype, torch.float32)
    norm_N = torch.cat([torch.linalg.vector_norm(x_CF, dim=1) for _, x_CF in _chunks(points_NF, rows, wide)])
    if not bool(norm_N.isfinite().all()):
        raise NumericFault("neurons hold NaN or infinity", hint="look at the weights: `moekit check`")
    weight_N, start_I = torch.where(norm_N > 0, weight_N.to(norm_N), 0.0), start_I.to(norm_N.device)
    centroids_IF = points_NF[start_I].to(wide)
    direction_IF = unit(centroids_IF)
    labels_N = torch.full((len(points_NF),), -1, device=points_NF.device)
    rounds = 0
    for _ in range(iterations):
        rounds += 1
        found_N = torch.cat([(x_CF @ direction_IF.T).argmax(dim=1) for _, x_CF in _chunks(points_NF, rows, wide)])
        if torch.equal(found_N, labels_N):
            break
        labels_N = found_N
        centroids_IF = _update(points_NF, norm_N, weight_N, labels_N, centroids_IF, rescale, rows)
        before_IF, direction_IF = direction_IF, unit(centroids_IF)
        if float(torch.linalg.vector_norm(direction_IF - before_IF, dim=1).max()) < tolerance:
            break
    return Clusters(centroids_IF, labels_N, rounds)


def _chunks(points_NF: Tensor, rows: int, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(points_NF), rows):
        chunk = slice(start, start + rows)
        yield chunk, points_NF[chunk].to(wide)


def _update(
    points_NF: Tensor, norm_N: Tensor, weight_N: Tensor, labels_N: Tensor, old_IF: Tensor, rescale: bool, rows: int
) -> Tensor:
    """Centroids of the clusters as they are; `old_IF` where there is none."""
    counts_N = weight_N > 0

    def by_cluster(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(len(old_IF)).index_add_(0, labels_N, values_N)

    members_I, total_I = by_cluster(counts_N.to(norm_N)), by_cluster(weight_N)
    mean_norm_I = by_cluster(norm_N * counts_N) / members_I.clamp_min(1)
    # Shares instead of weights: sums of parts of a unit vector neither overflow nor vanish.
    share_N = torch.where(counts_N, weight_N / total_I[labels_N] / norm_N, 0.0)
    new_IF = torch.zeros_like(old_IF)
    for chunk, x_CF in _chunks(points_NF, rows, old_IF.dtype):
        new_IF.index_add_(0, labels_N[chunk], x_CF * share_N[chunk, None])
    length_I = torch.linalg.vector_norm(new_IF, dim=1)
    known_I = (members_I > 0) & (length_I > _CANCELLED)
    scale_I = mean_norm_I / length_I.clamp_min(_CANCELLED) if rescale else mean_norm_I
    new_IF.mul_(scale_I[:, None])
    new_IF[~known_I] = old_IF[~known_I]
    single_N = counts_N & (members_I[labels_N] == 1)
    new_IF[labels_N[single_N]] = points_NF[single_N].to(old_IF.dtype)
    return new_IF
