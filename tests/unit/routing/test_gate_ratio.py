"""Ratios of gate weights: counted in bins, and the median read off them."""

from __future__ import annotations

import pytest
import torch

from moekit.routing.methods.naee_skip import gate_ratio
from moekit.routing.second import median
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import BINS, resolve


def measured(seen: TokenBatch, *names: str) -> LayerStatistics:
    stats = LayerStatistics.empty(resolve(names), seen.experts, 2)
    stats.update(seen)
    return stats


def test_ratios_are_counted_in_bins() -> None:
    # 0.25 = 128/512 and 0.5 = 256/512 open their bins, 1 is in the last; order of choices does not matter.
    weights_NK = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.5, 0.5], [2.0, 1.0], [1.0, 0.0], [1.0, 0.7]])
    indices_NK = torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1], [0, 1], [0, 3]])  # the last has one expert only
    counts_B = measured(TokenBatch(3, indices_NK, weights=weights_NK), "gate_ratio")["gate_ratio"]
    assert counts_B.dtype == torch.int64
    assert counts_B.shape == (BINS,)
    assert {b: int(counts_B[b]) for b in counts_B.nonzero().flatten().tolist()} == {128: 2, 256: 1, 511: 1}


def test_ratios_of_one_choice_are_none() -> None:
    assert int(gate_ratio(TokenBatch(3, torch.tensor([[0]]), weights=torch.ones(1, 1))).sum()) == 0


@pytest.mark.parametrize("tokens", [1, 2, 501, 1000])
def test_the_median_is_exact_to_a_bin(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    weights_NK = torch.rand(tokens, 2, generator=g)
    seen = TokenBatch(4, torch.tensor([[0, 1]]).expand(tokens, 2), weights=weights_NK)
    exact = float((weights_NK.amin(1) / weights_NK.amax(1)).median())  # the lower of the two middle ones
    assert abs(median(measured(seen, "gate_ratio")["gate_ratio"]) - exact) <= 0.5 / BINS + 1e-6


def test_parts_of_the_data_give_the_same_histogram() -> None:
    weights_NK = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    indices_NK = torch.tensor([[0, 1]]).expand(60, 2)
    parts = [
        measured(TokenBatch(2, indices_NK[rows], weights=weights_NK[rows]), "gate_ratio")
        for rows in (slice(0, 13), slice(13, 60))
    ]
    whole = measured(TokenBatch(2, indices_NK, weights=weights_NK), "gate_ratio")
    assert torch.equal(parts[0].merge(parts[1])["gate_ratio"], whole["gate_ratio"])


def test_the_median_of_nothing() -> None:
    with pytest.raises(ValueError, match="empty"):
        median(torch.zeros(BINS, dtype=torch.int64))
