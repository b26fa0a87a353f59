"""Merge traces of several runs or ranks; select a part of one.

Legend: N tokens, K choices a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch

from moekit.errors import BadData
from moekit.trace.data import AnyTrace, TraceData
from moekit.trace.meta import DataEntry, TraceMeta
from moekit.trace.statistics import Statistics
from moekit.trace.tokens import TokenLabels
from moekit.trace.vocabulary import get

# Fields that must be equal for two traces to be of the same thing.
_SAME = ("fingerprint", "routing", "layers", "experts", "top_k", "hidden", "tokenizer", "has_choices", "has_weights")


def merge(traces: Sequence[AnyTrace], *, documents: Literal["distinct", "shared"]) -> AnyTrace:
    """See `Trace.merge`."""
    if not traces:
        raise BadData("no trace to merge", hint="give at least one")
    return reduce(lambda first, second: _merge_two(first, second, documents == "shared"), traces)


def _refuse(first: TraceMeta, second: TraceMeta) -> None:
    for field in _SAME:
        left, right = getattr(first, field), getattr(second, field)
        if left != right:
            what = f"{left!r} and {right!r}" if field != "fingerprint" else f"{left[:12]!r} and {right[:12]!r}"
            raise BadData(f"traces with {field} {what} do not merge", hint="record them alike, on the same model")
    if set(first.statistics) != set(second.statistics):
        raise BadData(
            f"traces with statistics {sorted(first.statistics)} and {sorted(second.statistics)} do not merge",
            hint="record them with the same statistics",
        )


def _merge_two(first: AnyTrace, second: AnyTrace, shared: bool) -> AnyTrace:
    _refuse(first.meta, second.meta)
    domains = list(dict.fromkeys((*first.meta.domains, *second.meta.domains)))
    labels = None
    if first.meta.has_choices:
        here, there = first.labels, second.labels
        moved = there.shifted(
            sequences=int(here.sequence_N.max()) + 1 if len(here) else 0,
            documents=int(here.document_N.max()) + 1 if len(here) and not shared else 0,
            domains={d: domains.index(name) for d, name in enumerate(second.meta.domains)},
        )
        labels = TokenLabels.concatenate([here, moved])
    layers = first.meta.layers
    statistics = None
    if first.statistics is not None and second.statistics is not None:
        statistics = first.statistics.merge(second.statistics)
    meta = first.meta.model_copy(
        update={
            "tokens": first.meta.tokens + second.meta.tokens,
            "domains": domains,
            "data": _merge_data(first.meta.data, second.meta.data, shared),
            "seed": first.meta.seed if first.meta.seed == second.meta.seed else None,
            "warnings": statistics.warnings if statistics is not None else [],
        }
    )
    kept = layers if first.meta.has_choices else []
    weighed = layers if first.meta.has_weights else []
    return type(first)(
        meta,
        labels,
        {layer: torch.cat([first._indices[layer], second._indices[layer]]) for layer in kept},
        {layer: torch.cat([first._weights[layer], second._weights[layer]]) for layer in weighed},
        statistics,
    )


def _merge_data(first: list[DataEntry], second: list[DataEntry], shared: bool) -> list[DataEntry]:
    merged = {(e.source, e.domain, e.begins): e for e in first}
    for entry in second:
        key = (entry.source, entry.domain, entry.begins)
        known = merged.get(key, entry.model_copy(update={"documents": 0, "tokens": 0}))
        # Ranks that share a text may share documents; the larger number is what is certain.
        number = max(known.documents, entry.documents) if shared else known.documents + entry.documents
        merged[key] = known.model_copy(update={"documents": number, "tokens": known.tokens + entry.tokens})
    return list(merged.values())


def select(trace: AnyTrace, *, domain: str | None, document: int | None, phase: int | None) -> AnyTrace:
    """See `Trace.select`."""
    labels = trace.labels
    keep_N = torch.ones(len(labels), dtype=torch.bool)
    if domain is not None:
        if domain not in trace.meta.domains:
            raise BadData(f"the trace has no domain {domain!r}", hint=f"it has {', '.join(trace.meta.domains)}")
        keep_N &= labels.domain_N == trace.meta.domains.index(domain)
    if document is not None:
        keep_N &= labels.document_N == document
    if phase is not None:
        keep_N &= labels.phase_N == phase
    rows = keep_N.nonzero().flatten()
    kept = [name for name in trace.meta.statistics if get(name).from_choices and _computable(trace, name)]
    part = type(trace)(
        trace.meta.model_copy(update={"tokens": len(rows), "data": _selected_data(trace, labels[rows])}),
        labels[rows],
        {layer: t[rows] for layer, t in trace._indices.items()},
        {layer: t[rows] for layer, t in trace._weights.items()},
    )
    statistics: Statistics | None = part.require(kept) if kept else None
    warnings = statistics.warnings if statistics is not None else []
    part.meta = part.meta.model_copy(update={"statistics": kept, "warnings": warnings})
    part.statistics = statistics
    return part


def _computable(trace: TraceData, name: str) -> bool:
    return "weights" not in get(name).sources or trace.meta.has_weights


def _selected_data(trace: TraceData, labels: TokenLabels) -> list[DataEntry]:
    entries = {entry.domain: entry for entry in trace.meta.data}
    found = []
    for number, name in enumerate(trace.meta.domains):
        here = labels.domain_N == number
        if bool(here.any()):
            documents = len(torch.unique(labels.document_N[here]))
            known = entries.get(name, DataEntry(source="", domain=name, documents=0, tokens=0))
            found.append(known.model_copy(update={"documents": documents, "tokens": int(here.sum())}))
    return found
