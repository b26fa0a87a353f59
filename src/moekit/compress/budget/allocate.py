"""Share one budget of bytes among many units, each of which takes one of its choices: exactly, at the least cost.

A unit is whatever is decided apart: the experts that a layer keeps, the bits of an expert, the clusters of a layer; all
of them may share one budget. This is the multiple-choice knapsack problem.

Legend: U units, C choices of a unit, S steps of a common divisor of all sizes that the budget leaves room for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moekit.compress.budget.core import Core
from moekit.errors import BadConfig, NumericFault

K = TypeVar("K", bound=Hashable)

# Up to so many steps of all units together the table of dynamic programming is filled (a byte or four each); beyond,
# most choices are ruled out first.
MOST_CELLS = 8_000_000
# The same of a table over what is left then; where that is too large, too, the integer program is solved.
CORE_CELLS = 128_000_000
# How much more than the best share one may cost, by its own cost, where the table over what is left is too large.
# Sizes that are nearly alike (packed widths) fill a budget only in steps, which no price for a byte sees: a proof
# beyond that does not end within minutes, and costs are measured far less exactly.
TOLERANCE = 1e-4
# Where its search ends with the best share found: a number of nodes, since seconds would differ from run to run.
_NODES = 1000


def allocate(
    cost: Mapping[K, Sequence[float]],
    sizes: Mapping[K, Sequence[int]],
    budget: int,
    rules: Mapping[K, tuple[int, int]] | None = None,
) -> dict[K, int]:
    """Give each unit the choice that makes the total cost least, within a budget.

    Args:
        cost: unit -> cost of each choice; infinite where a choice is forbidden.
        sizes: unit -> bytes of each choice.
        budget: bytes of all units together.
        rules: unit -> first and last choice that it may take; all by default.

    Returns:
        Unit -> number of its choice. Of equally cheap shares the smallest one, where one table of dynamic programming
        holds all units; for more, any of them, by a table over the choices that matter; where that is too large, too, a
        share that costs about `TOLERANCE` of its cost more than the best one, at most.

    Raises:
        BadConfig: no share fits; names the least budget that does. Or a unit has no choice left.
        NumericFault: a cost is NaN.
    """
    units = list(cost)
    options = [allowed(unit, cost[unit], sizes[unit], (rules or {}).get(unit)) for unit in units]
    least = [min(size for _, _, size in choices) for choices in options]
    room = budget - sum(least)
    if room < 0:
        raise BadConfig(
            f"{budget:,} bytes do not hold the smallest choice of each of {len(units)} units",
            hint=f"allow at least {sum(least):,} bytes",
        )
    extra = [[size - low for _, _, size in choices] for choices, low in zip(options, least, strict=True)]
    step = math.gcd(*(e for unit in extra for e in unit)) or 1
    room = min(room, sum(map(max, extra)))
    steps = [[e // step for e in unit] for unit in extra]
    costs = [[value for _, value, _ in choices] for choices in options]
    solve = by_table if len(units) * (room // step + 1) <= MOST_CELLS else by_core
    taken = solve(costs, steps, room // step) if units else []
    return {unit: choices[n][0] for unit, choices, n in zip(units, options, taken, strict=True)}


def allowed(
    unit: Hashable, cost: Sequence[float], sizes: Sequence[int], rule: tuple[int, int] | None = None
) -> list[tuple[int, float, int]]:
    """(number, cost, bytes) of the choices that a unit may take.

    Raises:
        BadConfig: none is left.
        NumericFault: a cost is NaN.
    """
    first, last = rule or (0, len(cost) - 1)
    found = []
    for number, (value, size) in enumerate(zip(cost, sizes, strict=True)):
        if math.isnan(value):
            raise NumericFault(f"the cost of choice {number} of {unit} is NaN", hint="see `moekit check`")
        if first <= number <= last and value < math.inf:
            found.append((number, float(value), int(size)))
    if not found:
        raise BadConfig(f"{unit} has no choice left", hint=f"allow it one of {len(cost)} choices")
    return found


def by_table(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> list[int]:
    """Dynamic programming over units and room: best[s] is the least cost of the units so far that take s or less.

    Args:
        costs: unit -> cost of each of its choices.
        sizes: likewise, whole numbers, 0 or more.
        room: what all units may take together; the smallest choices fit.

    Returns:
        Number of each unit's choice; of equally cheap plans a small one.
    """
    best_S: npt.NDArray[np.float64] = np.zeros(room + 1)
    # One byte a cell where that holds the number of a choice.
    kind = np.int8 if max(map(len, costs)) < 128 else np.int32
    taken: list[npt.NDArray[Any]] = []
    for cost_C, size_C in zip(costs, sizes, strict=True):
        after_S = np.full(room + 1, np.inf)
        choice_S = np.zeros(room + 1, dtype=kind)
        for choice in sorted(range(len(cost_C)), key=lambda c: (size_C[c], c)):
            size = size_C[choice]
            if size > room:
                continue
            reached_S = best_S[: room + 1 - size] + cost_C[choice]
            better_S = reached_S < after_S[size:]
            after_S[size:][better_S] = reached_S[better_S]
            choice_S[size:][better_S] = choice
        best_S = after_S
        taken.append(choice_S)
    at, found = int(best_S.argmin()), []
    for choice_S, size_C in zip(reversed(taken), reversed(sizes), strict=True):
        found.append(int(choice_S[at]))
        at -= size_C[found[-1]]
    return found[::-1]


def by_core(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> list[int]:
    """The same for many units: a share close to the best one first, then the choices that may be in a better one.

    Arguments as in `by_table`; any of equally cheap plans.
    """
    core = Core(costs, sizes, room)
    tried = -math.inf
    if CORE_CELLS > 0 and not core.is_proven:
        tried = core.nearest(min(MOST_CELLS, CORE_CELLS) if MOST_CELLS > 0 else CORE_CELLS)
        core.solve(core.near(tried), by_table)
    # Whatever costs more than the gap is in no better share.
    near_UC = core.near(core.gap)
    if core.gap > tried and not core.is_proven and core.cells(near_UC) <= CORE_CELLS:
        core.solve(near_UC, by_table)
    elif core.gap > tried and core.gap > TOLERANCE * core.scale:
        core.solve(near_UC, _by_program)
    return [int(choice) for choice in core.taken_U]


def _by_program(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> list[int]:
    """The same as an integer program: one variable a choice, one equation a unit, one row for the budget (HiGHS)."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    unit_N = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    one = csr_array((np.ones(len(unit_N)), (unit_N, np.arange(len(unit_N)))))
    result = milp(
        np.concatenate([np.asarray(c, dtype=np.float64) for c in costs]),
        integrality=np.ones(len(unit_N)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(np.concatenate([np.asarray(s, dtype=np.float64) for s in sizes])[None], -np.inf, room),
        ],
        options={"mip_rel_gap": TOLERANCE, "node_limit": _NODES},
    )
    if result.x is None:  # nothing found in so many nodes: the smallest always fit
        return [min(range(len(size_C)), key=size_C.__getitem__) for size_C in sizes]
    starts = np.concatenate([[0], np.cumsum([len(c) for c in costs])])
    return [int(result.x[a:b].argmax()) for a, b in itertools.pairwise(starts)]
