"""The multiple-choice knapsack: every unit takes one of its choices, the sum of bytes is bounded, that of costs least.

Three ways, which bracket each other. Dynamic programming over units of bytes is exact but for rounding each choice's
bytes up to a unit, so that the budget holds. The linear relaxation needs no table: its solution runs along the lower
convex hulls of the units' choices, and at most one unit is left between two of them, which bounds what any plan can
reach from below. Rounded down, and with the bytes that are left given to a last dynamic programme, it is a plan, too.

Legend: N units, C choices of a unit, S steps of bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from moekit.compress.budget.allocate import allowed, by_table
from moekit.errors import BadConfig

K = TypeVar("K", bound=Hashable)

# Steps that a budget is cut into: each unit wastes at most one of them.
STEPS = 50_000
# Updates of single cells up to which the table of the whole problem is filled; a second or two.
MOST_UPDATES = 200_000_000
# Steps of the last programme, over the bytes that a rounded relaxation leaves.
_LAST_STEPS = 2_000

Numbers = Sequence[Sequence[float]]
Bytes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Share(Generic[K]):
    """What each unit takes.

    Attributes:
        chosen: unit -> number of its choice.
        cost: of all units.
        nbytes: of all units.
        bound: no plan costs less than this.
    """

    chosen: Mapping[K, int]
    cost: float
    nbytes: int
    bound: float


class Relaxed(NamedTuple):
    """The relaxation's solution.

    Attributes:
        bound: its cost.
        chosen: number of each unit's choice once the one unit in between has been rounded down, and later steps of
            other units that still fit have been taken.
    """

    bound: float
    chosen: list[int]


def solve(
    costs: Mapping[K, Sequence[float]],
    sizes: Mapping[K, Sequence[int]],
    budget: int,
    *,
    steps: int = STEPS,
    most_updates: int = MOST_UPDATES,
) -> Share[K]:
    """Give each unit the choice that makes the total cost least, within a budget.

    Args:
        costs: unit -> cost of each choice; infinite where it is forbidden.
        sizes: unit -> bytes of each choice.
        budget: bytes of all units together.
        steps: units of bytes that the budget is cut into where no common divisor of all sizes is coarser.
        most_updates: beyond so many updates of cells the relaxation is rounded instead of filling a table.

    Raises:
        BadConfig: no plan fits; names the least budget that does. Or a unit has no choice left.
        NumericFault: a cost is NaN.
    """
    units = list(costs)
    options = [allowed(unit, costs[unit], sizes[unit]) for unit in units]
    values = [[cost for _, cost, _ in choices] for choices in options]
    nbytes = [[size for _, _, size in choices] for choices in options]
    least = sum(min(each) for each in nbytes)
    if least > budget:
        raise BadConfig(
            f"{budget:,} bytes do not hold the smallest choice of each of {len(units)} units",
            hint=f"allow at least {least:,} bytes",
        )
    relaxed = relax(values, nbytes, budget)
    plans = [relaxed.chosen, spend_rest(values, nbytes, relaxed.chosen, budget)]
    step = step_of(nbytes, budget, steps)
    if sum(map(len, nbytes)) * ((budget - least) // step + 1) <= most_updates:
        plans.append(fill_table(values, nbytes, budget, step))
    best = min(plans, key=lambda plan: (_total(values, plan), _total(nbytes, plan)))
    chosen = {unit: choices[n][0] for unit, choices, n in zip(units, options, best, strict=True)}
    return Share(chosen, float(_total(values, best)), int(_total(nbytes, best)), relaxed.bound)


def _total(values: Sequence[Sequence[float]], plan: Sequence[int]) -> float:
    return math.fsum(each[n] for each, n in zip(values, plan, strict=True))


def step_of(sizes: Bytes, budget: int, steps: int = STEPS) -> int:
    """Bytes of a step: the common divisor of all that choices take beyond the smallest, or a part of the budget."""
    common = math.gcd(*(size - min(each) for each in sizes for size in each)) or 1
    return max(common, -(-budget // steps))


def fill_table(costs: Numbers, sizes: Bytes, budget: int, step: int) -> list[int]:
    """Dynamic programming over units and steps: exact where all sizes are whole steps, else each is rounded up.

    Args:
        costs: of each choice of each unit, finite.
        sizes: bytes likewise.
        budget: bytes; the smallest choices fit.
        step: bytes of a step.

    Returns:
        Number of each unit's choice; of equally cheap plans a small one.
    """
    least = [min(each) for each in sizes]
    extra = [[-(-(size - low) // step) for size in each] for each, low in zip(sizes, least, strict=True)]
    room = min((budget - sum(least)) // step, sum(map(max, extra)))
    return by_table(costs, extra, room)


def lower_hull(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Choices on the lower convex hull of cost over bytes, from the smallest to the cheapest.

    Each step along it costs more bytes and gains less a byte than the one before.
    """
    hull: list[int] = []
    for choice in sorted(range(len(costs)), key=lambda c: (sizes[c], costs[c], c)):
        if hull and costs[choice] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(costs, sizes, hull[-2], hull[-1]) <= _gain(costs, sizes, hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(costs: Sequence[float], sizes: Sequence[int], before: int, after: int) -> float:
    return (costs[before] - costs[after]) / (sizes[after] - sizes[before])


def relax(costs: Numbers, sizes: Bytes, budget: int) -> Relaxed:
    """The linear relaxation, by taking steps along all hulls in the order of their gain a byte.

    Args:
        costs: of each choice of each unit, finite.
        sizes: bytes likewise.
        budget: bytes; the smallest choices fit.
    """
    hulls = [lower_hull(cost_C, size_C) for cost_C, size_C in zip(costs, sizes, strict=True)]
    steps = sorted(
        (-_gain(costs[unit], sizes[unit], before, after), unit, place)
        for unit, hull in enumerate(hulls)
        for place, (before, after) in enumerate(itertools.pairwise(hull))
    )
    at = [0] * len(hulls)
    left = budget - sum(sizes[unit][hull[0]] for unit, hull in enumerate(hulls))
    start = [costs[unit][hull[0]] for unit, hull in enumerate(hulls)]
    gains: list[float] = []
    bound: float | None = None
    for slope, unit, place in steps:
        if at[unit] != place:
            continue  # a step before it did not fit
        before, after = hulls[unit][place], hulls[unit][place + 1]
        size = sizes[unit][after] - sizes[unit][before]
        if size > left:
            if bound is None:
                bound = math.fsum([*start, *gains, slope * left])
            continue
        at[unit], left = place + 1, left - size
        gains.append(costs[unit][after] - costs[unit][before])
    chosen = [hull[place] for hull, place in zip(hulls, at, strict=True)]
    return Relaxed(_total(costs, chosen) if bound is None else bound, chosen)


def spend_rest(costs: Numbers, sizes: Bytes, chosen: Sequence[int], budget: int) -> list[int]:
    """A plan made better by a last dynamic programme over the bytes that it leaves unspent.

    Units stay, or take a cheaper choice that those bytes pay for, on the hull or off it.
    """
    left = budget - int(_total(sizes, chosen))
    offers: dict[int, list[int]] = {}
    for unit, now in enumerate(chosen):
        better = [
            c
            for c, cost in enumerate(costs[unit])
            if cost < costs[unit][now] and sizes[unit][c] <= sizes[unit][now] + left
        ]
        if better:
            offers[unit] = [now, *better]
    if not offers or left <= 0:
        return list(chosen)
    values = [[costs[unit][c] for c in some] for unit, some in offers.items()]
    # What a smaller choice would free is not counted: extra bytes begin at none.
    extra = [[max(0, sizes[unit][c] - sizes[unit][some[0]]) for c in some] for unit, some in offers.items()]
    taken = fill_table(values, extra, left, max(1, -(-left // _LAST_STEPS)))
    made = list(chosen)
    for (unit, some), n in zip(offers.items(), taken, strict=True):
        made[unit] = some[n]
    return made
