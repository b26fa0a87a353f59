"""Large knapsacks made small: by Lagrange's relaxation most choices are seen not to belong to any best share.

At a price l for a byte each unit takes the choice of least cost + l size on its own. What all of them lose so, less l
times the budget, is below the cost of every share that fits; a choice that costs d more than its unit's best at that
price is in no share whose cost is less than d above that bound. So once some share is known whose cost is close to the
bound, few choices of few units, the core, are left to be decided exactly.

Legend: U units, C choices of a unit, padded with choices of infinite cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Costs, sizes, room -> number of each unit's choice.
Solver = Callable[[Sequence[Sequence[float]], Sequence[Sequence[int]], int], list[int]]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Halvings of the interval that holds the price.
_ROUNDS = 200
# A share so close to the bound, by its own cost, is as good as proven: sums in fp64 of many costs are no more exact.
_CLOSE = 1e-9


class Relaxed(NamedTuple):
    """What a price for bytes tells.

    Attributes:
        bound: no share that fits costs less.
        extra_UC: what each choice costs more than its unit's best at that price; 0 of the best.
        taken_U: choices that fit, the best ones at a slightly higher price.
    """

    bound: float
    extra_UC: Floats
    taken_U: Ints


def relax(costs_UC: Floats, sizes_UC: Ints, room: int) -> Relaxed:
    """The price at which the units take about what there is room for; the smallest choices fit."""

    def at(price: float) -> tuple[Ints, Floats]:
        priced_UC = costs_UC + price * sizes_UC
        return priced_UC.argmin(1), priced_UC

    def size(taken_U: Ints) -> int:
        return int(np.take_along_axis(sizes_UC, taken_U[:, None], 1).sum())

    low, high = 0.0, 1.0
    while size(at(high)[0]) > room and high < 1e300:
        low, high = high, high * 16
    if size(at(0.0)[0]) <= room:
        high = 0.0
    elif size(at(high)[0]) > room:  # costs that dwarf any price: take the smallest, of which the cheapest
        high = low
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if size(at(middle)[0]) > room else (low, middle)
    taken_U, priced_UC = at(high)
    if size(taken_U) > room:
        smallest_UC = np.where(np.isfinite(costs_UC), sizes_UC, np.iinfo(np.int64).max)
        tied_UC = smallest_UC == smallest_UC.min(1, keepdims=True)
        taken_U = np.where(tied_UC, costs_UC, np.inf).argmin(1)
    best_U1 = priced_UC.min(1, keepdims=True)
    return Relaxed(float(best_U1.sum() - high * room), priced_UC - best_U1, taken_U)


class Core:
    """A knapsack of which only a core is decided.

    Args:
        costs: unit -> cost of each of its choices, finite.
        sizes: likewise, whole numbers, 0 or more.
        room: what all units may take together; the smallest choices fit.
    """

    def __init__(self, costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> None:
        shape = (len(costs), max(map(len, costs)))
        self.costs_UC, self.sizes_UC = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
        for unit, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
            self.costs_UC[unit, : len(cost)] = cost
            self.sizes_UC[unit, : len(size)] = size
        self.room = room
        self.relaxed = relax(self.costs_UC, self.sizes_UC, room)
        self.taken_U = self.relaxed.taken_U

    @property
    def gap(self) -> float:
        """How much less than the share found the best one may cost."""
        total = float(np.take_along_axis(self.costs_UC, self.taken_U[:, None], 1).sum())
        return max(total - self.relaxed.bound, 0.0)

    @property
    def scale(self) -> float:
        """Sum of the sizes of the costs of the share found."""
        return float(np.abs(np.take_along_axis(self.costs_UC, self.taken_U[:, None], 1)).sum())

    @property
    def is_proven(self) -> bool:
        """Whether no other share costs less than the one found, as far as sums in fp64 tell."""
        return self.gap <= _CLOSE * self.scale

    def near(self, limit: float) -> npt.NDArray[np.bool_]:
        """Choices that cost at most so much more than their unit's best, and those of the share found, [U, C]."""
        near_UC: npt.NDArray[np.bool_] = self.relaxed.extra_UC <= limit
        near_UC[np.arange(len(near_UC)), self.taken_U] = True
        return near_UC

    def nearest(self, most_cells: int) -> float:
        """The largest limit whose core fills a table of so many cells."""
        extra = np.sort(self.relaxed.extra_UC[np.isfinite(self.costs_UC)])
        few, many = 0, len(extra)
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self.cells(self.near(extra[middle])) <= most_cells else (few, middle)
        return float(extra[few])

    def cells(self, near_UC: npt.NDArray[np.bool_]) -> int:
        """Cells of the table of dynamic programming over some choices."""
        units, _, sizes, room = self._small(near_UC)
        return len(units) * (room // _step(sizes) + 1)

    def solve(self, near_UC: npt.NDArray[np.bool_], solver: Solver) -> None:
        """Decide among some choices, those of the share found among them."""
        units, numbers, sizes, room = self._small(near_UC)
        if not len(units):
            return
        step = _step(sizes)
        costs = [self.costs_UC[unit, number_c].tolist() for unit, number_c in zip(units, numbers, strict=True)]
        found = solver(costs, [[size // step for size in each] for each in sizes], room // step)
        taken_U = self.taken_U.copy()
        for unit, number_c, choice in zip(units, numbers, found, strict=True):
            taken_U[unit] = number_c[choice]
        before, self.taken_U = (self.gap, self.taken_U), taken_U
        if self.gap > before[0]:
            self.taken_U = before[1]

    def _small(self, near_UC: npt.NDArray[np.bool_]) -> tuple[Ints, list[Ints], list[list[int]], int]:
        """Units with a choice, numbers of their choices, sizes above each unit's least, and room for these."""
        large = np.iinfo(np.int64).max
        least_U = np.where(near_UC, self.sizes_UC, large).min(1)
        units = (near_UC.sum(1) > 1).nonzero()[0]
        numbers = [near_UC[unit].nonzero()[0] for unit in units]
        sizes = [(self.sizes_UC[u, number_c] - least_U[u]).tolist() for u, number_c in zip(units, numbers, strict=True)]
        return units, numbers, sizes, min(self.room - int(least_U.sum()), sum(map(max, sizes)))


def _step(sizes: Sequence[Sequence[int]]) -> int:
    """A common divisor of all sizes."""
    return math.gcd(*(size for each in sizes for size in each)) or 1
