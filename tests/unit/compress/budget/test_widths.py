"""Sharing bits: against every share tried out, the published worked examples, and what a budget promises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from moekit.compress.budget.widths import (
    Costs,
    LayerCurve,
    layer_shares,
    model_shares,
    near_best,
    ranked_shares,
    stepped_shares,
)

WIDTHS = (1, 2, 3)
# PMQ's example: phi w eps^2 with phi = (.5, .3, .15, .05), w = (.6, .2, .15, .05).
PHI, SCORE = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.6, 0.2, 0.15, 0.05])
EPS = np.array([[8, 4, 2], [6, 3, 1.5], [5, 2, 1], [4, 2, 1]])
PMQ: Costs = (PHI * SCORE)[:, None] * EPS**2
# GEMQ's example: two layers of two experts.
GEMQ: Costs = np.array([[9, 4, 0.5], [6, 5, 1], [2, 1.2, 0.2], [0.8, 0.3, 0.1]])


def cost_of(cost: Costs, bits: Sequence[int], widths: Sequence[int]) -> float:
    return float(sum(row[widths.index(n)] for row, n in zip(cost, bits, strict=True)))


def spreads(bits: Sequence[int], widths: Sequence[int]) -> bool:
    return widths[-1] in bits and widths[-2] in bits


def brute(cost: Costs, widths: Sequence[int], total: int, spread: bool, sizes: Sequence[int] | None = None) -> float:
    """The least cost by trying every share; without the rule where no share follows it."""
    sizes = sizes or [1] * len(cost)
    every = [
        bits
        for bits in itertools.product(widths, repeat=len(cost))
        if sum(n * s for n, s in zip(bits, sizes, strict=True)) <= total
    ]
    spread = spread and total < len(cost) * widths[-1]
    ruled = [bits for bits in every if spreads(bits, widths)] if spread else every
    return min(cost_of(cost, bits, widths) for bits in ruled or every)


def falling(seed: int, experts: int, widths: int) -> Costs:
    made = np.sort(np.random.default_rng(seed).lognormal(sigma=1.5, size=(experts, widths)), axis=1)[:, ::-1]
    return np.ascontiguousarray(made)


@pytest.mark.parametrize(
    ("total", "bits", "cost"),
    [(7, (3, 2, 1, 1), 2.3425), (8, (3, 2, 2, 1), 1.87), (9, (3, 3, 2, 1), 1.465), (10, (3, 3, 2, 2), 1.435),
     (11, (3, 3, 3, 2), 1.3675)],
)  # fmt: skip
def test_pmqs_worked_example(total: int, bits: tuple[int, ...], cost: float) -> None:
    assert layer_shares(PMQ, WIDTHS, total, spread=True) == bits
    assert cost_of(PMQ, bits, WIDTHS) == pytest.approx(cost)
    assert LayerCurve(PMQ, WIDTHS, spread=True).costs()[total - 4] == pytest.approx(cost)


@pytest.mark.parametrize(
    ("total", "bits", "cost"),
    [(6, (3, 1, 1, 1), 9.3), (7, (2, 3, 1, 1), 7.8), (8, (3, 3, 1, 1), 4.3), (9, (3, 3, 2, 1), 3.5),
     (10, (3, 3, 3, 1), 2.5)],
)  # fmt: skip
def test_gemqs_worked_example(total: int, bits: tuple[int, ...], cost: float) -> None:
    assert tuple(model_shares(GEMQ, [7] * 4, WIDTHS, 7 * total)) == bits
    assert cost_of(GEMQ, bits, WIDTHS) == pytest.approx(cost)


def test_gemqs_example_by_layer_and_under_the_rule() -> None:
    assert layer_shares(GEMQ[:2], WIDTHS, 4) == (3, 1)
    assert layer_shares(GEMQ[2:], WIDTHS, 4) == (3, 1)
    ruled = [LayerCurve(cost, WIDTHS, spread=True).costs(strict=True) for cost in (GEMQ[:2], GEMQ[2:])]
    assert [np.isinf(curve).tolist() for curve in ruled] == [[True, True, True, False, False]] * 2, "at least 3 + 2"
    assert ruled[0][3] + ruled[1][3] == pytest.approx(5.5)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("widths", [(1, 2, 3), (2, 3, 4), (2, 4, 8), (3, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_a_layers_share_is_the_best_of_all(seed: int, widths: tuple[int, ...], spread: bool) -> None:
    cost = falling(seed, 5, len(widths))
    curve = LayerCurve(cost, widths, spread=spread).costs()
    for total in range(5 * widths[0], 5 * widths[-1] + 1):
        bits = layer_shares(cost, widths, total, spread=spread)
        best = brute(cost, widths, total, spread)
        assert sum(bits) <= total
        assert cost_of(cost, bits, widths) == pytest.approx(best)
        assert curve[total - 5 * widths[0]] == pytest.approx(best)


def test_eight_experts_against_every_share() -> None:
    cost = falling(9, 8, 3)
    for total in (10, 13, 16, 20, 23, 24):
        assert cost_of(cost, layer_shares(cost, WIDTHS, total, spread=True), WIDTHS) == pytest.approx(
            brute(cost, WIDTHS, total, True)
        )


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (6, 6, 4, 4, 4)])
def test_a_models_share_is_the_best_of_all_and_the_hull_is_no_better(sizes: tuple[int, ...]) -> None:
    cost = falling(4, 5, 4)
    widths = (1, 2, 4, 8)
    for total in range(sum(sizes), 8 * sum(sizes) + 1, 3):
        bits = model_shares(cost, sizes, widths, total)
        best = brute(cost, widths, total, False, sizes)
        assert sum(n * s for n, s in zip(bits, sizes, strict=True)) <= total
        assert cost_of(cost, bits, widths) == pytest.approx(best)
        chosen, bound = near_best(cost, sizes, widths, total)
        assert bound <= best + 1e-9
        assert cost_of(cost, [widths[c] for c in chosen], widths) >= best - 1e-9


def test_the_hull_comes_near_where_no_table_is_filled() -> None:
    """3,000 experts: the bound of the relaxation and what was found are one edge apart at most."""
    cost, widths = falling(5, 3000, 3), (2, 3, 4)
    total = int(2.4 * 3000)
    chosen, bound = near_best(cost, [1] * 3000, widths, total)
    bits = [widths[c] for c in chosen]
    assert sum(bits) <= total
    found = cost_of(cost, bits, widths)
    assert bound <= found <= bound + float(np.abs(np.diff(cost, axis=1)).min(axis=1).max())
    assert found - bound < 1e-3 * bound


def test_more_bits_never_cost_more_and_a_rule_never_costs_less() -> None:
    cost = falling(6, 12, 3)
    plain, ruled = (LayerCurve(cost, WIDTHS, spread=spread).costs() for spread in (False, True))
    assert np.all(np.diff(plain) <= 0)
    # Below 12 + 3 bits the rule cannot be followed, and is left out.
    assert np.all(np.diff(ruled[3:]) <= 0)
    assert np.all(ruled >= plain)
    assert layer_shares(cost, WIDTHS, 36, spread=True) == (3,) * 12
    assert layer_shares(cost, WIDTHS, 12, spread=True) == (1,) * 12


def test_the_order_of_experts_and_the_scale_of_costs_change_nothing() -> None:
    cost = falling(7, 9, 3)
    order = np.random.default_rng(0).permutation(9)
    bits = layer_shares(cost, WIDTHS, 17, spread=True)
    assert layer_shares(cost[order], WIDTHS, 17, spread=True) == tuple(bits[e] for e in order)
    assert layer_shares(cost * 1e-12, WIDTHS, 17, spread=True) == bits
    assert model_shares(cost[order], [1] * 9, WIDTHS, 17) == [model_shares(cost, [1] * 9, WIDTHS, 17)[e] for e in order]


def test_of_equal_costs_the_fewest_bits_then_the_lowest_expert() -> None:
    dead = np.zeros((3, 3))
    assert layer_shares(dead, WIDTHS, 9) == (1, 1, 1)
    assert layer_shares(dead, WIDTHS, 8, spread=True) == (3, 2, 1)
    alike = np.tile([0.7, 0.3, 0.1], (5, 1))
    assert layer_shares(alike, WIDTHS, 7) == (2, 2, 1, 1, 1)
    mixed = np.vstack([dead[:1], alike[:2], dead[:1]])
    assert layer_shares(mixed, WIDTHS, 12) == (1, 3, 3, 1), "experts without cost get no bits that are left over"


def test_ranks_are_nested_in_the_budget() -> None:
    order, sizes, widths = [3, 0, 2, 1], [2, 2, 1, 1], (2, 3, 4)
    assert ranked_shares(order, sizes, widths, 14) == [2, 2, 2, 4]
    assert ranked_shares(order, sizes, widths, 16) == [3, 2, 2, 4]
    assert ranked_shares(order, sizes, widths, 18) == [4, 2, 2, 4]
    before = [0] * 4
    for total in range(12, 25):
        bits = ranked_shares(order, sizes, widths, total)
        assert sum(n * s for n, s in zip(bits, sizes, strict=True)) <= total
        assert all(a <= b for a, b in zip(before, bits, strict=True))
        before = bits
    assert before == [4] * 4


def test_steps_raise_one_unit_at_a_time() -> None:
    assert stepped_shares([2, 0, 2, 1, 0, 1], [1, 1, 1], (2, 4, 8), 6) == [2, 2, 2]
    assert stepped_shares([2, 0, 2, 1, 0, 1], [1, 1, 1], (2, 4, 8), 14) == [4, 2, 8]
    assert stepped_shares([2, 0, 2, 1, 0, 1], [1, 1, 1], (2, 4, 8), 24) == [8, 8, 8]
