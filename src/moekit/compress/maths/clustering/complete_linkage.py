"""Agglomerative clustering under complete linkage: exact, and the same on every machine.

Two clusters are as far apart as their farthest members. The closest two are joined first; of equally close pairs the
one with the lower smallest member goes first. So at a threshold t every pair inside a cluster is closer than t, and
clusters for larger t are unions of those for smaller t.

Legend: N items.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import numpy as np
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
    gap = np.array(distance_NN.detach().cpu().double().numpy())
    items = len(gap)
    if np.isnan(gap).any() or np.isneginf(gap).any():
        raise NumericFault("a distance between experts is not a number", hint="run moekit check on the model")
    gap = np.maximum(gap, gap.T)
    np.fill_diagonal(gap, np.inf)
    joins: list[tuple[int, int]] = []
    heights: list[float] = []
    for _ in range(items - 1):
        # A cluster lives in the row of its smallest member, so the first minimum is the pair of lowest members.
        stays, goes = sorted(map(int, np.unravel_index(gap.argmin(), gap.shape)))
        height = float(gap[stays, goes])
        if height == math.inf:
            break
        joins.append((stays, goes))
        heights.append(height)
        gap[stays] = gap[:, stays] = np.maximum(gap[stays], gap[goes])
        gap[goes] = gap[:, goes] = np.inf
        gap[stays, stays] = np.inf
    return Dendrogram(items, tuple(joins), tuple(heights))
