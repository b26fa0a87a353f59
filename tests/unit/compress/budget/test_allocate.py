"""The knapsack against every share tried one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import moekit.compress.budget.allocate as module
from moekit.compress.budget.allocate import allocate
from moekit.compress.engine.dropping import share_by_score
from moekit.errors import BadConfig, NumericFault

units = st.lists(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=4), min_size=1, max_size=4
)


def tried(cost: dict[int, list[float]], sizes: dict[int, list[int]], budget: int) -> float | None:
    """The least cost of any share that fits; None where none does."""
    fitting = [
        sum(cost[u][c] for u, c in zip(cost, share, strict=True))
        for share in itertools.product(*(range(len(c)) for c in cost.values()))
        if sum(sizes[u][c] for u, c in zip(cost, share, strict=True)) <= budget
    ]
    return min(fitting, default=None)


@pytest.mark.parametrize("how", ["table", "core", "program"])
@settings(max_examples=60, deadline=None)
@given(made=units, budget=st.integers(0, 40), scale=st.sampled_from([1, 3, 4096]))
def test_no_other_share_is_cheaper(how: str, made: list[list[tuple[int, int]]], budget: int, scale: int) -> None:
    cost = {number: [float(c) for c, _ in unit] for number, unit in enumerate(made)}
    sizes = {number: [s * scale for _, s in unit] for number, unit in enumerate(made)}
    best = tried(cost, sizes, budget * scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_CELLS", 10**7 if how == "table" else -1)
        patch.setattr(module, "CORE_CELLS", 10**7 if how == "core" else 0)
        if best is None:
            with pytest.raises(BadConfig, match="do not hold the smallest choice"):
                allocate(cost, sizes, budget * scale)
            return
        found = allocate(cost, sizes, budget * scale)
    assert sum(sizes[u][c] for u, c in found.items()) <= budget * scale
    assert sum(cost[u][c] for u, c in found.items()) == pytest.approx(best, abs=1e-6)


def test_thousands_of_units_against_a_bound_worked_out_here() -> None:
    # sum of min(cost + l size) - l budget is below every share's cost, whatever the price l of a byte.
    costs_UC = np.random.default_rng(0).lognormal(sigma=2, size=(2048, 1)) * np.array([16.0, 4.0, 1.0])
    sizes_C = np.array([10_003, 20_011, 40_013])
    budget = 2048 * 21_000
    rows = dict(enumerate(costs_UC.tolist()))
    found = allocate(rows, dict.fromkeys(rows, sizes_C.tolist()), budget)
    spent, total = sum(int(sizes_C[c]) for c in found.values()), sum(rows[u][c] for u, c in found.items())
    prices = np.geomspace(1e-8, 1e2, 4001)
    bound = max(float((costs_UC + price * sizes_C).min(1).sum()) - price * budget for price in prices)
    assert spent <= budget
    assert bound <= total <= bound * (1 + 1e-3)


def test_experts_bits_and_clusters_share_one_budget() -> None:
    # By hand: 10 bytes. Halving the experts of layer 0 saves 4 at a cost of 3, 2 bits in place of 4 save 2 at 1, one
    # cluster in place of two saves 3 at 5; of 16 bytes 6 must go, which experts and bits do for 4.
    cost = {"experts of layer 0": [3.0, 0.0], "bits of expert 7": [1.0, 0.0], "clusters of layer 3": [5.0, 0.0]}
    sizes = {"experts of layer 0": [4, 8], "bits of expert 7": [2, 4], "clusters of layer 3": [1, 4]}
    assert list(allocate(cost, sizes, 10).values()) == [0, 0, 1]
    assert list(allocate(cost, sizes, 16).values()) == [1, 1, 1]
    assert list(allocate(cost, sizes, 11, {"experts of layer 0": (1, 1)}).values()) == [1, 0, 0]


def test_of_equally_cheap_shares_the_smallest() -> None:
    assert allocate({0: [1.0, 1.0]}, {0: [5, 2]}, 9) == {0: 1}


def test_what_no_share_fits_is_told_with_the_least_that_does() -> None:
    with pytest.raises(BadConfig) as caught:
        allocate({0: [1.0], 1: [2.0]}, {0: [700], 1: [800]}, 1499)
    assert "1,500" in str(caught.value.hint)
    with pytest.raises(BadConfig, match="no choice left"):
        allocate({3: [math.inf, math.inf]}, {3: [1, 2]}, 9)
    with pytest.raises(NumericFault, match="choice 1 of 3"):
        allocate({3: [0.0, math.nan]}, {3: [1, 2]}, 9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), layers=st.integers(1, 3), experts=st.integers(2, 5), spare=st.integers(0, 15))
def test_sharing_experts_by_score_is_the_knapsack_of_lost_scores(
    seed: int, layers: int, experts: int, spare: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {layer: torch.rand(experts, generator=generator, dtype=torch.float64) for layer in range(layers)}
    total = min(layers + spare, layers * experts)
    lost = {
        layer: [
            float("inf"),
            *(float((s / s.sum()).sort().values[:gone].sum()) for gone in reversed(range(experts))),
        ]
        for layer, s in scores.items()
    }
    counts = allocate(lost, {layer: list(range(experts + 1)) for layer in scores}, total)
    greedy = share_by_score(scores, total, 1, experts)
    assert sum(lost[layer][n] for layer, n in counts.items()) == pytest.approx(
        sum(lost[layer][n] for layer, n in greedy.items())
    )
