"""Put a trace together from what was recorded of each layer.

Legend: N tokens, K choices a token, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moekit.trace.accumulator import LabelAccumulator, LayerRecord
from moekit.trace.meta import TraceMeta
from moekit.trace.statistics import Statistics
from moekit.trace.store import Trace

logger = logging.getLogger(__name__)


def assemble(
    records: Mapping[int, LayerRecord],
    labels: LabelAccumulator,
    domains: Sequence[str],
    *,
    names: Sequence[str],
    source: str,
    begins: Sequence[int],
    told: Mapping[str, Any],
) -> Trace:
    """Make a trace.

    Args:
        records: decoder layer -> what was recorded.
        labels: the account of tokens.
        domains: names of the domains, by number.
        names: of the statistics.
        source: where the text came from.
        begins: ids that each document was read behind.
        told: model, fingerprint, routing, tokenizer, seed, as `TraceMeta` takes them.
    """
    numbers = sorted(records)
    ordered = [records[number] for number in numbers]
    statistics = Statistics({number: records[number].statistics for number in numbers}) if names else None
    meta = TraceMeta(
        **told,
        data=labels.data(source, domains, begins),
        layers=numbers,
        experts=[record.geometry.experts for record in ordered],
        top_k=[record.top_k for record in ordered],
        hidden=ordered[0].geometry.hidden,
        widths=[record.geometry.width for record in ordered],
        tokens=labels.tokens,
        has_choices=ordered[0].indices is not None,
        has_weights=ordered[0].weights is not None,
        domains=list(domains),
        statistics=list(names),
        warnings=statistics.warnings if statistics is not None else [],
    )
    for warning in meta.warnings:
        logger.warning("%s", warning)
    if not meta.has_choices:
        return Trace(meta, statistics=statistics)
    tokens, order = labels.sorted()

    def sort(kept: Tensor) -> Tensor:
        return kept if order is None else kept[order]

    indices = {n: sort(r.indices) for n, r in records.items() if r.indices is not None}
    weights = {n: sort(r.weights) for n, r in records.items() if r.weights is not None}
    return Trace(meta, tokens, indices, weights, statistics)
