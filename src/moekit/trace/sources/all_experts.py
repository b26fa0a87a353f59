"""Outputs of all experts on every token, a few tokens at a time: made, looked at, and freed.

Legend: N tokens, n tokens of a chunk, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moekit.trace.batch import TokenBatch
from moekit.trace.each_expert import OneExpert
from moekit.trace.sources.table import CHUNK_BYTES


def all_outputs(one: OneExpert, seen: TokenBatch, limit: int = CHUNK_BYTES) -> Iterator[TokenBatch]:
    """Run every expert on every token, chunk by chunk.

    Args:
        one: runs one expert.
        seen: the tokens, with what the experts are given.
        limit: bytes of outputs held at a time.

    Yields:
        Parts of `seen`, in order, with the outputs [n, E, H] of all experts.
    """
    hidden_NH = seen.given("hidden")
    size = max(1, limit // (seen.experts * hidden_NH.shape[1] * hidden_NH.element_size()))
    for start in range(0, seen.tokens, size):
        rows = slice(start, start + size)
        made_nEH = torch.stack([one(expert, hidden_NH[rows])[1] for expert in range(seen.experts)], dim=1)
        yield replace(seen.rows(rows), all_outputs=made_nEH)
