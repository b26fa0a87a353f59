"""Histograms of pools against definitions."""

from __future__ import annotations

import math

import pytest
import torch

from moekit.compress.prune import premoe as pools
from moekit.errors import BadConfig
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import BINS, get, resolve

LOGITS = torch.tensor([[2.0, 1.0, -1.0, -3.0], [-0.5, -1.0, -2.0, -4.0], [1.0, 3.0, 0.0, 2.9]])


def seen(logits_NE: torch.Tensor = LOGITS, top_k: int = 2) -> TokenBatch:
    return TokenBatch(logits_NE.shape[1], logits_NE.topk(top_k).indices, logits=logits_NE)


def measured(*observations: TokenBatch, names: list[str]) -> LayerStatistics:
    stats = LayerStatistics.empty(resolve(names), observations[0].experts, 4)
    for part in observations:
        stats.update(part)
    return stats


def test_pools_of_the_worked_example() -> None:
    experts_NP, logits_NP, p_NP = pools.pool(seen(), 2)
    assert experts_NP.tolist() == [[0, 1], [0, 1], [1, 3]]
    assert logits_NP.flatten().tolist() == pytest.approx([2, 1, -0.5, -1, 3, 2.9])
    assert p_NP[:, 0].tolist() == pytest.approx([0.7310586, 0.6224593, 0.5249792])
    peak = measured(seen(), names=["pool_peak(2)"])["pool_peak(2)"]
    assert float(peak) / 3 == pytest.approx(0.6261657, abs=1e-6)


def test_entries_lie_in_the_bin_of_their_probability() -> None:
    sums_EB = measured(seen(), names=["pool_logit(2)"])["pool_logit(2)"]
    assert sums_EB.shape == (4, BINS)
    filled = {(int(e), int(b)): float(sums_EB[e, b]) for e, b in sums_EB.nonzero()}
    expected = {}
    for best, second, pair in ((2.0, 1.0, (0, 1)), (-0.5, -1.0, (0, 1)), (3.0, 2.9, (1, 3))):
        p = 1 / (1 + math.exp(second - best))
        expected[pair[0], math.floor(p * BINS)] = best
        expected[pair[1], math.floor((1 - p) * BINS)] = second
    assert filled == pytest.approx(expected)


def test_utility_is_the_logit_but_never_negative() -> None:
    values = pools.utility(torch.tensor([-50.0, -1.0, 0.0, 0.3, 2.0]))
    assert values.tolist() == pytest.approx([0.0, 0.2689414, 0.5, 0.5744425, 2.0], abs=1e-6)


def test_members_of_a_pool_of_the_models_own_size_are_its_choices() -> None:
    logits_NE = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    observed = seen(logits_NE, top_k=3)
    experts_NP, _, _ = pools.pool(observed, 0)
    assert torch.equal(torch.bincount(experts_NP.flatten(), minlength=6), observed.chosen_NE.sum(0).long())
    by_name = measured(observed, names=["pool_utility(0)", "pool_utility(3)"])
    assert torch.equal(by_name["pool_utility(0)"], by_name["pool_utility(3)"])


def test_a_pool_has_at_most_all_experts_and_equal_logits_go_to_the_lower() -> None:
    experts_NP, _, p_NP = pools.pool(seen(torch.zeros(2, 4)), 9)
    assert experts_NP.tolist() == [[0, 1, 2, 3]] * 2
    assert p_NP.flatten().tolist() == [0.25] * 8
    assert pools.pool(seen(torch.tensor([[1.0, 2.0, 2.0, 2.0]])), 2)[0].tolist() == [[1, 2]]


def test_a_pool_of_one_is_certain() -> None:
    sums_EB = measured(seen(), names=["pool_utility(1)"])["pool_utility(1)"]
    assert float(sums_EB[:, : BINS - 1].abs().sum()) == 0.0
    assert float(measured(seen(), names=["pool_peak(1)"])["pool_peak(1)"]) == 3.0


@pytest.mark.parametrize("name", ["pool_utility(2)", "pool_logit(2)", "pool_peak(2)"])
def test_batches_add_up_in_any_order(name: str) -> None:
    logits_NE = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    whole = measured(seen(logits_NE), names=[name])
    parts = [measured(seen(part), names=[name]) for part in (logits_NE[40:], logits_NE[:1], logits_NE[1:40])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.tokens == 64
    torch.testing.assert_close(merged[name], whole[name], rtol=1e-9, atol=1e-9)


def test_the_bin_of_the_threshold_counts_whole() -> None:
    sums_EB = torch.zeros(1, BINS, dtype=torch.float64)
    sums_EB[0, 0], sums_EB[0, 255], sums_EB[0, 256], sums_EB[0, 511] = 1.0, 2.0, 4.0, 8.0
    for threshold, expected in ((0.0, 15), (0.001, 15), (0.002, 14), (0.4999, 14), (0.5, 12), (0.5019, 12), (0.502, 8)):
        assert float(pools.above(sums_EB, threshold)) == expected, threshold
    assert float(pools.above(sums_EB, 1.0)) == 8.0


def test_forbidden_experts_count_nothing() -> None:
    low = float("-inf")
    logits_NE = torch.tensor([[low, 1.0, low, low], [low, low, low, low]])
    names = ["pool_utility(2)", "pool_logit(2)", "pool_peak(2)"]
    stats = measured(TokenBatch(4, torch.tensor([[1, 4], [4, 4]]), logits=logits_NE), names=names)
    assert stats["pool_logit(2)"].sum(1).tolist() == [0, 1, 0, 0]
    assert stats["pool_utility(2)"].sum(1).tolist() == [0, 1, 0, 0]
    assert float(stats["pool_peak(2)"]) == 1.0


@pytest.mark.parametrize("name", ["pool_utility(-1)", "pool_logit(1.5)", "pool_peak()", "pool_peak(1,2)"])
def test_impossible_pools(name: str) -> None:
    with pytest.raises(BadConfig, match="pool"):
        get(name)
