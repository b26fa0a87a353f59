"""Rows per document, and paired intervals over documents: what one routing or placement sends beyond another.

The same documents are routed twice; a document's tokens share topic and style, so that documents, not tokens, are what
is resampled. Both figures are ratios of sums over documents b, and a resample draws numerator and denominator alike::

    difference = sum_b (first_b - second_b) / sum_b tokens_b
    change     = sum_b (second_b - first_b) / sum_b first_b

The interval of a change is not that of the difference divided by a fixed first: documents that send many rows one way
send many the other way, so that their ratio varies less than either.

Legend: N tokens, K choices, E experts, D devices, B documents, L layers, S resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moekit._intervals import RESAMPLES, ratio_interval
from moekit.errors import BadConfig, BadData
from moekit.placement.plan import Placement
from moekit.placement.replaying import (
    CHUNK_ENTRIES,
    Devices,
    Home,
    check_choices,
    choose_copy,
    holders,
    presence,
    resolve_home,
)
from moekit.placement.simulation import check_trace

if TYPE_CHECKING:
    from moekit.trace.store import Trace


@dataclass(frozen=True)
class PairedRows:
    """A difference in rows per token and layer, absolute and relative, each with its bootstrap interval.

    Attributes:
        first: rows per token of the first.
        second: rows per token of the second.
        difference: first - second: positive where the second sends fewer.
        low: lower end of its interval.
        high: upper end.
        change: rows of the second relative to the first, less one: -0.1 is a tenth fewer.
        change_low: lower end of its interval.
        change_high: upper end.
        confidence: level of both intervals.
        documents: B.
        resamples: S.
        seed: of the resampling.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    confidence: float
    documents: int
    resamples: int
    seed: int


def rows_per_document(
    indices_NK: torch.Tensor,
    device_of_E: Devices,
    document_N: torch.Tensor,
    devices: int,
    home: Home = "round-robin",
    *,
    nodes: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sent once per device, and tokens, of every document: those of `replay`, told apart by document.

    Args:
        indices_NK: choices, E for none.
        device_of_E: device of each expert, or all that hold a copy.
        document_N: document of each token; -1 (padding) is left out.
        devices: D.
        home: see `replay`; which copy of an expert serves a token depends on it.
        nodes: M.

    Returns:
        rows_B and tokens_B, int64, B the highest document number + 1.

    Raises:
        BadData: choices outside 0..E, or not one document per token.
    """
    holder_ER = holders(device_of_E, devices)
    chosen_NK = check_choices(indices_NK, len(holder_ER))
    number_N = document_N.to("cpu", torch.int64)
    if number_N.shape != (len(chosen_NK),):
        raise BadData(f"{list(number_N.shape)} document numbers for {len(chosen_NK)} tokens")
    home_N = resolve_home(home, len(chosen_NK), devices, document_N)
    documents = int(number_N.max()) + 1 if len(number_N) else 0
    rows_B = torch.zeros(documents, dtype=torch.int64)
    step = max(1, CHUNK_ENTRIES // (2 * devices + 4 * max(1, chosen_NK.shape[1]) * holder_ER.shape[1]))
    for start in range(0, len(chosen_NK), step):
        part_home = None if home_N is None else home_N[start : start + step]
        device_NK = choose_copy(chosen_NK[start : start + step], holder_ER, devices, nodes, part_home, start)
        rows_N = presence(device_NK, devices).sum(dim=1)
        part_N = number_N[start : start + step]
        rows_B.index_add_(0, part_N[part_N >= 0], rows_N[part_N >= 0])
    return rows_B, torch.bincount(number_N[number_N >= 0], minlength=documents)


def paired_rows(
    first_B: torch.Tensor,
    second_B: torch.Tensor,
    tokens_B: torch.Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedRows:
    """Rows of the same documents, routed or placed in two ways; intervals as in `moekit._intervals`.

    Args:
        first_B: rows of each document, once.
        second_B: rows of the same documents, the other way.
        tokens_B: tokens of each document.
        confidence: level of the interval.
        resamples: S.
        seed: of the resampling.

    Raises:
        BadData: fewer than two documents with tokens, which give no interval, or lists of different length.
        BadConfig: impossible confidence or resamples.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise BadConfig(f"no interval at confidence {confidence} from {resamples} resamples")
    if not len(first_B) == len(second_B) == len(tokens_B):
        raise BadData("both sides must list the same documents")
    used = (tokens_B > 0).numpy()
    first, second, tokens = (t.numpy().astype(np.float64)[used] for t in (first_B, second_B, tokens_B))
    if not len(tokens):
        raise BadData("there are no documents to compare", hint="trace some text")
    if len(tokens) == 1:
        raise BadData("one document gives no interval", hint="trace at least two documents, or passages of one")
    drawn = partial(ratio_interval, level=confidence, resamples=resamples, seed=seed)
    low, high = drawn(first - second, tokens)
    change_low, change_high = drawn(second - first, first)
    return PairedRows(
        first=float(first.sum() / tokens.sum()),
        second=float(second.sum() / tokens.sum()),
        difference=float((first - second).sum() / tokens.sum()),
        low=low,
        high=high,
        change=float((second - first).sum() / first.sum()),
        change_low=change_low,
        change_high=change_high,
        confidence=confidence,
        documents=len(tokens),
        resamples=resamples,
        seed=seed,
    )


def trace_rows_per_document(trace: Trace, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of every document summed over layers, and its tokens times layers.

    Raises:
        BadConfig: trace and placement do not belong together.
    """
    check_trace(trace, placement)
    layers = trace.meta.layers
    parts = [
        rows_per_document(
            trace.indices(n), placement.holders(n), trace.document_N, placement.devices, nodes=placement.nodes
        )
        for n in layers
    ]
    return torch.stack([rows_B for rows_B, _ in parts]).sum(dim=0), parts[0][1] * len(layers)


def constraint_gain(
    free: Trace,
    free_placement: Placement,
    constrained: Trace,
    constrained_placement: Placement,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedRows:
    """What a routing constraint spares beyond placement alone, in rows per token and layer.

    Args:
        free: trace of the unconstrained model.
        free_placement: the best placement for it.
        constrained: trace of the constrained model on the same documents.
        constrained_placement: the best placement for that.
        confidence: level of the interval.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        BadData: the traces are not of the same documents.
        BadConfig: a trace and its placement do not belong together, or devices differ.
    """
    if free_placement.devices != constrained_placement.devices:
        raise BadConfig("the placements are for different numbers of devices", hint="compare equal numbers")
    known = {trace.meta.tokenizer for trace in (free, constrained)} - {""}
    first_B, tokens_B = trace_rows_per_document(free, free_placement)
    second_B, other_B = trace_rows_per_document(constrained, constrained_placement)
    if not torch.equal(tokens_B, other_B) or len(known) > 1:
        raise BadData(
            "the two traces are not of the same documents, layer for layer",
            hint="profile both models on the same text, with the same tokenizer and batches",
        )
    return paired_rows(first_B, second_B, tokens_B, confidence=confidence, resamples=resamples, seed=seed)
