"""The knapsack between all kinds of compression: against enumeration, its own bounds, and an example worked by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from moekit.compress.joint.knapsack import fill_table, lower_hull, relax, solve, spend_rest, step_of
from moekit.errors import BadConfig, NumericFault

# Three layers, bytes and costs of their choices.
SIZES = {"A": [16, 8, 4], "B": [16, 8, 4], "C": [16, 8, 4]}
COSTS = {"A": [0, 0.01, 0.06], "B": [0, 0.02, 0.03], "C": [0, 0.10, 0.50]}


def enumerated(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """Least cost of all plans that fit, by trying each."""
    plans = itertools.product(*(range(len(each)) for each in costs))
    fitting = [
        math.fsum(each[n] for each, n in zip(costs, plan, strict=True))
        for plan in plans
        if sum(each[n] for each, n in zip(sizes, plan, strict=True)) <= budget
    ]
    return min(fitting, default=math.inf)


def problem(seed: int, units: int = 5, choices: int = 4, most: int = 60) -> tuple[list[list[float]], list[list[int]]]:
    """Choices in no order, some of them dominated."""
    draw = random.Random(seed)
    sizes = [[draw.randint(1, most) for _ in range(choices)] for _ in range(units)]
    costs = [[draw.random() * most / size for size in each] for each in sizes]
    return costs, sizes


def named(values: list[list[float]]) -> dict[int, list[float]]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("budget", "taken", "cost"),
    [
        (24, (4, 4, 16), 0.09),
        (28, (8, 4, 16), 0.04),
        (20, (8, 4, 8), 0.14),
        (16, (4, 4, 8), 0.19),
    ],
)
def test_the_worked_example(budget: int, taken: tuple[int, ...], cost: float) -> None:
    share = solve(COSTS, SIZES, budget)
    assert tuple(SIZES[layer][share.chosen[layer]] for layer in "ABC") == taken
    assert share.cost == pytest.approx(cost)
    assert share.nbytes == sum(taken)


@pytest.mark.parametrize("seed", range(30))
def test_the_table_finds_what_enumeration_finds(seed: int) -> None:
    costs, sizes = problem(seed)
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in (least, (least + most) // 2, most):
        plan = fill_table(costs, sizes, budget, 1)
        assert sum(each[n] for each, n in zip(sizes, plan, strict=True)) <= budget
        made = math.fsum(each[n] for each, n in zip(costs, plan, strict=True))
        assert made == pytest.approx(enumerated(costs, sizes, budget))


@pytest.mark.parametrize("seed", range(30))
def test_relaxation_optimum_and_rounding_bracket_each_other(seed: int) -> None:
    costs, sizes = problem(seed)
    budget = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    best, relaxed = enumerated(costs, sizes, budget), relax(costs, sizes, budget)
    rounded = math.fsum(each[n] for each, n in zip(costs, relaxed.chosen, strict=True))
    repaired = spend_rest(costs, sizes, relaxed.chosen, budget)
    assert relaxed.bound <= best + 1e-12
    assert best <= rounded + 1e-12
    assert math.fsum(each[n] for each, n in zip(costs, repaired, strict=True)) <= rounded + 1e-12
    assert sum(each[n] for each, n in zip(sizes, repaired, strict=True)) <= budget


def test_the_relaxation_is_the_linear_programme() -> None:
    from scipy.optimize import linprog

    for seed in range(5):
        costs, sizes = problem(seed)
        budget = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
        flat = [cost for each in costs for cost in each]
        one = [[float(unit == own) for unit, each in enumerate(costs) for _ in each] for own in range(len(costs))]
        weights = [[size for each in sizes for size in each]]
        found = linprog(flat, A_ub=weights, b_ub=[budget], A_eq=one, b_eq=[1] * len(costs), bounds=(0, 1))
        assert relax(costs, sizes, budget).bound == pytest.approx(found.fun, abs=1e-9)


def test_the_optimum_never_rises_with_the_budget() -> None:
    costs, sizes = problem(1)
    found = [solve(named(costs), dict(enumerate(sizes)), b).cost for b in range(sum(map(min, sizes)), 260, 7)]
    assert found == sorted(found, reverse=True)


def test_another_choice_never_hurts() -> None:
    for seed in range(10):
        costs, sizes = problem(seed, choices=5)
        budget = sum(map(min, (each[:4] for each in sizes))) + 40
        fewer = solve(named([c[:4] for c in costs]), dict(enumerate(s[:4] for s in sizes)), budget)
        assert solve(named(costs), dict(enumerate(sizes)), budget).cost <= fewer.cost + 1e-12


def test_the_order_of_layers_and_the_scale_of_costs_change_nothing() -> None:
    costs, sizes = problem(3)
    budget = 130
    told = solve(named(costs), dict(enumerate(sizes)), budget)
    for order in itertools.permutations(range(len(costs))):
        again = solve({u: costs[u] for u in order}, {u: sizes[u] for u in order}, budget)
        assert again.chosen == told.chosen
    scaled = solve({u: [1000 * c for c in costs[u]] for u in range(5)}, dict(enumerate(sizes)), budget)
    assert scaled.chosen == told.chosen


def test_a_budget_that_holds_everything_costs_nothing() -> None:
    share = solve(COSTS, SIZES, 48)
    assert (share.cost, share.bound, dict(share.chosen)) == (0, 0, {"A": 0, "B": 0, "C": 0})


def test_too_small_a_budget_is_refused_with_the_least_that_does() -> None:
    with pytest.raises(BadConfig, match="allow at least 12 bytes"):
        solve(COSTS, SIZES, 11)


def test_costs_that_are_no_numbers_are_refused_and_infinite_ones_never_taken() -> None:
    with pytest.raises(NumericFault):
        solve({0: [math.nan, 1.0]}, {0: [1, 2]}, 3)
    assert solve({0: [math.inf, 1.0]}, {0: [1, 2]}, 3).chosen == {0: 1}


def test_bytes_that_share_no_divisor_are_rounded_up_so_that_the_budget_holds() -> None:
    costs, sizes = problem(7, units=6, most=1_000_003)
    budget = sum(map(min, sizes)) + 900_001
    share = solve(named(costs), dict(enumerate(sizes)), budget, steps=1000)
    assert step_of(sizes, budget, 1000) == -(-budget // 1000)
    assert share.nbytes <= budget
    # Each of six units wastes a step at most: no worse than the optimum of a budget smaller by that.
    assert share.cost <= enumerated(costs, sizes, budget - 6 * step_of(sizes, budget, 1000)) + 1e-12


def test_many_units_are_solved_without_a_table() -> None:
    costs, sizes = problem(5, units=300, choices=5)
    budget = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    exact = solve(named(costs), dict(enumerate(sizes)), budget)
    rounded = solve(named(costs), dict(enumerate(sizes)), budget, most_updates=0)
    assert exact.bound == rounded.bound
    assert exact.bound <= exact.cost <= rounded.cost <= exact.bound * 1.01


def test_hulls_leave_out_what_no_straight_line_takes() -> None:
    # The middle one lies above the line between its neighbours; the last is dearer than what is smaller.
    assert lower_hull([9, 8, 1, 2], [1, 2, 3, 4]) == [0, 2]
