"""Share a mean number of bits among experts of one width each: exactly within a layer, by the hull over a whole model.

Costs are those of each expert at each of a few widths; a budget counts bits and is never exceeded.

Legend: E experts of a layer, C widths, ascending, U units (experts, or layers as a whole), S bits beyond the fewest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moekit.compress.budget.allocate import MOST_CELLS, allocate

Costs = npt.NDArray[np.float64]
# Costs become whole numbers of so many bits together: equal costs are then equal in any order of adding them up.
_EXACT_BITS = 61
_NEVER = np.int64(1) << 62
# Units that are decided anew, together, once the hull has told where the budget ends.
_CORE = 512


def layer_shares(cost_EC: Costs, widths_C: Sequence[int], total: int, *, spread: bool = False) -> tuple[int, ...]:
    """Bits of each expert of one layer at the least cost, by dynamic programming: exact.

    Of equally cheap shares one with the fewest bits, and of those the one that gives most to the lowest expert.

    Args:
        cost_EC: of each expert at each width, not negative.
        widths_C: the widths, ascending.
        total: bits that all experts may have together, one weight of each; at least the fewest of all.
        spread: at least one expert at the largest width and one at the next; left out where that cannot be, and where
            there is enough for all to have the largest.
    """
    curve = LayerCurve(cost_EC, widths_C, spread=spread)
    return curve.shares(min(total, len(cost_EC) * widths_C[-1]))


class LayerCurve:
    """The least cost of a layer for every number of bits, and what reaches it.

    Args:
        cost_EC: see `layer_shares`.
        widths_C: see `layer_shares`.
        spread: see `layer_shares`.
    """

    def __init__(self, cost_EC: Costs, widths_C: Sequence[int], *, spread: bool = False) -> None:
        experts, self._widths = len(cost_EC), list(widths_C)
        self._cost_EC, self._scale = _whole(np.asarray(cost_EC, dtype=np.float64))
        self._fewest = experts * widths_C[0]
        # Which of the two largest widths an expert of some width sees to, as a bit each.
        seen = {len(widths_C) - 1: 2, len(widths_C) - 2: 1} if spread and len(widths_C) > 1 else {}
        self._marks = [seen.get(c, 0) for c in range(len(widths_C))]
        self._table = self._filled(experts * (widths_C[-1] - widths_C[0]), range(4) if seen else range(1))

    def _filled(self, room: int, states: range) -> list[list[npt.NDArray[np.int64]]]:
        """[e][needed][s]: the least cost of experts e and on, within s bits beyond the fewest, `needed` seen to."""
        last = [np.full(room + 1, 0 if needed == 0 else _NEVER, dtype=np.int64) for needed in states]
        table = [last]
        for cost_C in self._cost_EC[::-1]:
            behind, table_e = table[-1], []
            for needed in states:
                best_S = np.full(room + 1, _NEVER, dtype=np.int64)
                for c, cost in enumerate(cost_C):
                    step = self._widths[c] - self._widths[0]
                    reached_S = behind[needed & ~self._marks[c]][: room + 1 - step] + cost
                    np.minimum(best_S[step:], reached_S, out=best_S[step:])
                table_e.append(best_S)
            table.append(table_e)
        return table[::-1]

    def _start(self, room: int) -> int:
        """What is to be seen to within so many bits: both large widths, but not where all may have the largest."""
        first = self._table[0]
        return len(first) - 1 if first[-1][room] < _NEVER and room < len(first[-1]) - 1 else 0

    def costs(self, *, strict: bool = False) -> Costs:
        """The least cost for every number of bits from the fewest on, [S].

        Args:
            strict: infinite where the rule cannot be followed, which is left out there otherwise.
        """
        first = self._table[0]
        if strict:
            return np.where(first[-1] < _NEVER, first[-1] / self._scale, np.inf)
        values = [first[self._start(s)][s] for s in range(len(first[0]))]
        return np.asarray(values, dtype=np.float64) / self._scale

    def shares(self, total: int, *, strict: bool = False) -> tuple[int, ...]:
        """What reaches the least cost within a number of bits; see `costs`."""
        room = total - self._fewest
        needed = len(self._table[0]) - 1 if strict else self._start(room)
        best_S = self._table[0][needed]
        at = int(np.searchsorted(-best_S[: room + 1], -best_S[room]))
        found: list[int] = []
        for e, cost_C in enumerate(self._cost_EC):
            for c in reversed(range(len(self._widths))):
                left, still = at - (self._widths[c] - self._widths[0]), needed & ~self._marks[c]
                if left >= 0 and self._table[e + 1][still][left] + cost_C[c] == self._table[e][needed][at]:
                    break
            found.append(self._widths[c])
            at, needed = left, still
        return tuple(found)


def _whole(cost_EC: Costs) -> tuple[npt.NDArray[np.int64], float]:
    """Costs as whole numbers whose sum over experts fits, and what they were multiplied by."""
    most = float(cost_EC.max(initial=0.0))
    if most <= 0:
        return np.zeros(cost_EC.shape, dtype=np.int64), 1.0
    scale = 2.0 ** (_EXACT_BITS - int(np.ceil(np.log2(len(cost_EC) + 1)))) / most
    return np.rint(cost_EC * scale).astype(np.int64), scale


def model_shares(cost_UC: Costs, sizes_U: Sequence[int], widths_C: Sequence[int], total: int) -> list[int]:
    """Bits of units that share one budget, at the least cost.

    Exact where a table of all units and bits can be filled (`allocate`), else nearly so: see `near_best`.

    Args:
        cost_UC: of each unit at each width.
        sizes_U: weights of each unit.
        widths_C: the widths, ascending.
        total: bits of all weights together.
    """
    step = int(np.gcd.reduce(np.asarray(sizes_U, dtype=np.int64)))
    room = min(total, sum(sizes_U) * widths_C[-1]) - sum(sizes_U) * widths_C[0]
    if len(cost_UC) * (room // step + 1) > MOST_CELLS:
        chosen, _ = near_best(cost_UC, sizes_U, widths_C, total)
    else:
        chosen = _exact(cost_UC, sizes_U, widths_C, total, range(len(cost_UC)))
    return [widths_C[c] for c in chosen]


def _exact(
    cost_UC: Costs, sizes_U: Sequence[int], widths_C: Sequence[int], total: int, units: Sequence[int]
) -> list[int]:
    taken = allocate(
        {unit: cost_UC[unit].tolist() for unit in units},
        {unit: [width * sizes_U[unit] for width in widths_C] for unit in units},
        total,
    )
    return [taken[unit] for unit in units]


def near_best(cost_UC: Costs, sizes_U: Sequence[int], widths_C: Sequence[int], total: int) -> tuple[list[int], float]:
    """Choice of each unit, and a cost that no share can be below.

    The linear relaxation takes, of all units' lower hulls, the edges that gain most for a bit, until the budget ends;
    one of them is left in part, and its value is the bound. The units whose edges lie next to that one are then decided
    anew, exactly, with all bits that the others leave.

    Args:
        cost_UC: see `model_shares`.
        sizes_U: see `model_shares`.
        widths_C: see `model_shares`.
        total: see `model_shares`.
    """
    gain_X, unit_X, from_X, to_X = _edges(cost_UC, sizes_U, widths_C)
    bits_X = (np.asarray(widths_C)[to_X] - np.asarray(widths_C)[from_X]) * np.asarray(sizes_U)[unit_X]
    order_X = np.lexsort((from_X, unit_X, -gain_X))
    spent_X = np.cumsum(bits_X[order_X])
    room = total - sum(sizes_U) * widths_C[0]
    taken = int(np.searchsorted(spent_X, room, side="right"))
    chosen_U = np.zeros(len(cost_UC), dtype=np.int64)
    np.maximum.at(chosen_U, unit_X[order_X[:taken]], to_X[order_X[:taken]])
    bound = float(cost_UC[np.arange(len(cost_UC)), chosen_U].sum())
    if taken < len(order_X):
        left = room - (int(spent_X[taken - 1]) if taken else 0)
        bound -= float(gain_X[order_X[taken]]) * left
        nearest_X = np.argsort(np.abs(np.arange(len(order_X)) - taken), kind="stable")
        core: list[int] = sorted(list(dict.fromkeys(unit_X[order_X[nearest_X]].tolist()))[:_CORE])
        mine = sum(sizes_U[u] * widths_C[chosen_U[u]] for u in core)
        whole = sum(size * widths_C[c] for size, c in zip(sizes_U, chosen_U.tolist(), strict=True))
        chosen_U[core] = _exact(cost_UC, sizes_U, widths_C, total - (whole - mine), core)
    return chosen_U.tolist(), bound


def _edges(cost_UC: Costs, sizes_U: Sequence[int], widths_C: Sequence[int]) -> tuple[Any, Any, Any, Any]:
    """All edges of the units' lower hulls: gain for a bit, unit, and the choices that each leads from and to."""
    found: list[tuple[float, int, int, int]] = []
    for unit, cost_C in enumerate(cost_UC.tolist()):
        hull: list[int] = [0]
        for c in range(1, len(cost_C)):
            if cost_C[c] >= cost_C[hull[-1]]:
                continue
            while len(hull) > 1 and _slope(cost_C, widths_C, hull[-1], c) >= _slope(
                cost_C, widths_C, hull[-2], hull[-1]
            ):
                hull.pop()
            hull.append(c)
        size = sizes_U[unit]
        found += [(_slope(cost_C, widths_C, a, b) / size, unit, a, b) for a, b in itertools.pairwise(hull)]
    columns = list(zip(*found, strict=True)) or [(), (), (), ()]
    gain_X = np.asarray(columns[0], dtype=np.float64)
    unit_X, from_X, to_X = (np.asarray(column, dtype=np.int64) for column in columns[1:])
    return gain_X, unit_X, from_X, to_X


def _slope(cost_C: Sequence[float], widths_C: Sequence[int], first: int, last: int) -> float:
    """What a bit gains on the way from one choice to another."""
    return (cost_C[first] - cost_C[last]) / (widths_C[last] - widths_C[first])


def ranked_shares(order_U: Sequence[int], sizes_U: Sequence[int], widths_C: Sequence[int], total: int) -> list[int]:
    """The first of an order get the largest width until the budget ends; one more gets what fits, the rest the least.

    With more bits nobody gets fewer.

    Args:
        order_U: units, those that are to get most first.
        sizes_U: weights of each unit.
        widths_C: the widths, ascending.
        total: bits of all weights together.
    """
    found = [widths_C[0]] * len(sizes_U)
    left = total - sum(sizes_U) * widths_C[0]
    for unit in order_U:
        fitting = [width for width in widths_C if (width - widths_C[0]) * sizes_U[unit] <= left]
        found[unit] = fitting[-1]
        left -= (fitting[-1] - widths_C[0]) * sizes_U[unit]
        if fitting[-1] != widths_C[-1]:
            break
    return found


def stepped_shares(order_U: Sequence[int], sizes_U: Sequence[int], widths_C: Sequence[int], total: int) -> list[int]:
    """Each mention in an order raises a unit by one width, as long as that fits; with more bits nobody gets fewer.

    Args:
        order_U: units, each as often as it may be raised.
        sizes_U: weights of each unit.
        widths_C: the widths, ascending.
        total: bits of all weights together.
    """
    at = [0] * len(sizes_U)
    left = total - sum(sizes_U) * widths_C[0]
    for unit in order_U:
        step = (widths_C[min(at[unit] + 1, len(widths_C) - 1)] - widths_C[at[unit]]) * sizes_U[unit]
        if step > left:
            break
        at[unit], left = min(at[unit] + 1, len(widths_C) - 1), left - step
    return [widths_C[c] for c in at]
