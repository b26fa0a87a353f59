"""Agglomerative clustering: the closest two clusters are joined, again and again; the same on every machine.

How far apart two clusters are is the linkage: their farthest members ("complete"), their nearest ("single"), the mean
over all pairs of members ("average"), or by how much the members' squared distances to their mean grow ("ward").
Clusters of fewer joins are parts of those of more. Under complete linkage every pair inside a cluster is closer than
the threshold that the tree is cut at.

Legend: N items.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.cluster import hierarchy
from torch import Tensor

from moekit.errors import NumericFault

Clusters = tuple[tuple[int, ...], ...]
Linkage = Literal["average", "single", "complete", "ward"]
Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dendrogram:
    """All joins of a clustering, closest first.

    Attributes:
        items: N.
        joins: smallest members of the two clusters joined, lower first; at most N - 1.
        heights: distance of each join; ascending.
    """

    items: int
    joins: tuple[tuple[int, int], ...]
    heights: tuple[float, ...]

    def after(self, joins: int) -> Clusters:
        """Clusters after the first `joins` joins, each ascending, ordered by smallest member."""
        members = {item: [item] for item in range(self.items)}
        for stays, goes in self.joins[:joins]:
            members[stays] += members.pop(goes)
        return tuple(tuple(sorted(members[item])) for item in sorted(members))

    def below(self, threshold: float) -> Clusters:
        """Clusters after all joins at less than the threshold."""
        return self.after(bisect.bisect_left(self.heights, threshold))

    def leaving(self, clusters: int) -> Clusters:
        """So many clusters, or the fewest there can be where infinite distances forbid further joins."""
        return self.after(max(0, self.items - clusters))


def agglomerate(distance_NN: Tensor, linkage: Linkage) -> Dendrogram:
    """Cluster items by their pairwise distances.

    Of equally close pairs the one of the lower items is joined first under complete and single linkage; under the
    others, whose heights are sums that round, scipy's order holds.

    Args:
        distance_NN: symmetric; the diagonal is ignored. Any real numbers under complete and single linkage, where items
            at infinite distance never meet; for "ward" distances of points, such as Euclidean ones.
        linkage: how far apart clusters are.

    Raises:
        NumericFault: a distance is NaN, minus infinity, or, under average and Ward's linkage, infinite.
    """
    gap_NN = distance_NN.detach().cpu().double().numpy()
    ordinal = linkage in ("complete", "single")
    if np.isnan(gap_NN).any() or np.isneginf(gap_NN).any() or not (ordinal or np.isfinite(gap_NN).all()):
        raise NumericFault("a distance between experts is not a number", hint="run moekit check on the model")
    items = len(gap_NN)
    if items < 2:
        return Dendrogram(items, (), ())
    pairs = np.triu_indices(items, 1)
    gaps = np.maximum(gap_NN[pairs], gap_NN.T[pairs])
    return _replayed(items, _ranked(gaps, linkage) if ordinal else hierarchy.linkage(gaps, linkage))


def _ranked(gaps: Array, linkage: Linkage) -> Array:
    """What scipy finds where only the order of distances counts.

    Ranks give the same tree, break ties by the lowest pair, and are finite where distances are not.
    """
    order = gaps.argsort(kind="stable")
    rank = np.empty(len(gaps))
    rank[order] = np.arange(len(gaps))
    found: Array = hierarchy.linkage(rank, linkage)
    found[:, 2] = gaps[order[found[:, 2].astype(np.int64)]]
    return found


def _replayed(items: int, found: Array) -> Dendrogram:
    """Joins by the clusters' lowest members, up to the first at infinite distance."""
    lowest, joins, heights = list(range(items)), [], []
    for left, right, height, _ in found:
        if height == math.inf:
            break
        stays, goes = sorted((lowest[int(left)], lowest[int(right)]))
        lowest.append(stays)
        joins.append((stays, goes))
        heights.append(float(height))
    return Dendrogram(items, tuple(joins), tuple(heights))
