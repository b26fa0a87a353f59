"""Streaming statistics: the tensors of a layer, and the general statistics, one file a subject.

A statistic that only one method reads stands in the method's own file; every module of this folder is imported when the
vocabulary is first read (`moekit.trace.vocabulary.known_statistics`).
"""

from moekit.trace.statistics.containers import (
    CHUNK_TOKENS,
    LayerStatistics,
    Statistics,
    coactivation,
    combine,
    load,
)

__all__ = ["CHUNK_TOKENS", "LayerStatistics", "Statistics", "coactivation", "combine", "load"]
