"""Agglomerative clustering under complete linkage: exact, and the same on every machine.

Two clusters are as far apart as their farthest members. The closest two are joined first; of equally close pairs the
one of the lower items goes first. So at a threshold t every pair inside a cluster is closer than t, and
clusters for larger t are unions of those for smaller t.

Legend: N items.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
from scipy.cluster import hierarchy
from torch import Tensor

from moekit.errors import NumericFault

Clusters = tuple[tuple[int, ...], ...]


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
        """Clusters in which every pair is closer than the threshold."""
        return self.after(bisect.bisect_left(self.heights, threshold))

    def leaving(self, clusters: int) -> Clusters:
        """So many clusters, or the fewest there can be where infinite distances forbid further joins."""
        return self.after(max(0, self.items - clusters))


def complete_linkage(distance_NN: Tensor) -> Dendrogram:
    """Cluster items by their pairwise distances.

    Args:
        distance_NN: symmetric; any real numbers, the diagonal is ignored. Items at infinite distance never meet.

    Raises:
        NumericFault: a distance is NaN or minus infinity.
    """
    gap_NN = distance_NN.detach().cpu().double().numpy()
    if np.isnan(gap_NN).any() or np.isneginf(gap_NN).any():
        raise NumericFault("a distance between experts is not a number", hint="run moekit check on the model")
    items = len(gap_NN)
    if items < 2:
        return Dendrogram(items, (), ())
    pairs = np.triu_indices(items, 1)
    gaps = np.maximum(gap_NN[pairs], gap_NN.T[pairs])
    # Complete linkage only asks which of two distances is larger: ranks give the same tree, break ties by the lowest
    # pair, and are finite where distances are not.
    order = gaps.argsort(kind="stable")
    rank = np.empty(len(gaps))
    rank[order] = np.arange(len(gaps))
    lowest, joins, heights = list(range(items)), [], []
    for left, right, at, _ in hierarchy.linkage(rank, "complete"):
        if (height := float(gaps[order[int(at)]])) == math.inf:
            break
        stays, goes = sorted((lowest[int(left)], lowest[int(right)]))
        lowest.append(stays)
        joins.append((stays, goes))
        heights.append(height)
    return Dendrogram(items, tuple(joins), tuple(heights))
