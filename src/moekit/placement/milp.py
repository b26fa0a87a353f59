"""Placement as a mixed-integer linear programme, solved by HiGHS through scipy, with a bound and a time limit.

    maximise   sum_{i<j,d} w_ij z_ijd - lambda (m - 1)
    x_id in {0, 1}   expert i is on device d;      sum_d x_id = 1;   sum_i x_id = s_d
    z_ijd >= 0       both are;                     z_ijd <= x_id, x_jd
    sum_{j != i} z_ijd = (s_d - 1) x_id            an expert has s_d - 1 companions: the row that makes the bound sharp
    m >= sum_i load_i x_id / mean                  largest load
Devices of one size are alike: device d of them may hold expert i only if an earlier expert is on device d - 1.

Legend: E experts, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moekit.placement.objective import Floats, Problem

# HiGHS compares in absolute terms; with all pairs summing to this, its tolerance is far below one count in a million.
SCALE = 1e4


@dataclass(frozen=True)
class MilpResult:
    """What HiGHS found.

    Attributes:
        groups: device of each expert; None if the time limit came before any placement.
        bound: upper bound on the value.
        proven: whether the search finished.
    """

    groups: list[int] | None
    bound: float
    proven: bool


class _Rows:
    """Collects sparse constraint rows low <= A v <= high."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        row = len(self._low)
        self._entries += [(row, column, value) for column, value in terms]
        self._low.append(low)
        self._high.append(high)

    def build(self, columns: int) -> LinearConstraint:
        rows, cols, values = zip(*self._entries, strict=True)
        matrix = coo_array((values, (rows, cols)), shape=(len(self._low), columns)).tocsr()
        return LinearConstraint(matrix, np.array(self._low), np.array(self._high))


class _Model:
    """Numbers of the variables, and the rows over them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.experts, self.devices = problem.experts, problem.devices
        pairs = [(i, j) for i in range(self.experts) for j in range(i + 1, self.experts)]
        self.pair_number = {pair: n for n, pair in enumerate(pairs)}
        self.assign = self.experts * self.devices
        self.columns = self.assign + len(pairs) * self.devices + 1

    def x(self, expert: int, device: int) -> int:
        return expert * self.devices + device

    def z(self, first: int, second: int, device: int) -> int:
        pair = (min(first, second), max(first, second))
        return self.assign + self.pair_number[pair] * self.devices + device

    @property
    def m(self) -> int:
        return self.columns - 1

    def objective(self) -> Floats:
        """Coefficients to minimise."""
        total = self.problem.total_pairs
        cost = np.zeros(self.columns)
        for (i, j), number in self.pair_number.items():
            start = self.assign + number * self.devices
            cost[start : start + self.devices] = -SCALE * self.problem.weight_EE[i, j] / (total or 1.0)
        cost[self.m] = SCALE * self.problem.load_weight
        return cost

    def constraints(self, floor: float) -> LinearConstraint:
        """All rows; placements worth less than `floor` are cut off."""
        rows, experts, devices = _Rows(), range(self.experts), range(self.devices)
        for i in experts:
            rows.add([(self.x(i, d), 1.0) for d in devices], 1, 1)
        for d in devices:
            size = self.problem.sizes[d]
            rows.add([(self.x(i, d), 1.0) for i in experts], size, size)
            for i in experts:
                companions = [(self.z(i, j, d), 1.0) for j in experts if j != i]
                rows.add([*companions, (self.x(i, d), 1.0 - size)], 0, 0)
            for i, j in self.pair_number:
                for expert in (i, j):
                    rows.add([(self.z(i, j, d), 1.0), (self.x(expert, d), -1.0)], -np.inf, 0)
        self._break_symmetry(rows)
        self._bound_load(rows)
        cost = self.objective()
        terms = [(int(c), float(cost[c])) for c in np.flatnonzero(cost)]
        if terms:
            rows.add(terms, -np.inf, -SCALE * (floor - 1e-9) + SCALE * self.problem.load_weight)
        return rows.build(self.columns)

    def _break_symmetry(self, rows: _Rows) -> None:
        for size in set(self.problem.sizes):
            alike = [d for d, s in enumerate(self.problem.sizes) if s == size]
            for before, after in pairwise(alike):
                for i in range(self.experts):
                    earlier = [(self.x(j, before), -1.0) for j in range(i)]
                    rows.add([(self.x(i, after), 1.0), *earlier], -np.inf, 0)

    def _bound_load(self, rows: _Rows) -> None:
        load_E = self.problem.load_E
        mean = load_E.sum() / self.devices
        if self.problem.load_weight and mean > 0:
            for d in range(self.devices):
                terms = [(self.x(i, d), float(load_E[i] / mean)) for i in range(self.experts)]
                rows.add([*terms, (self.m, -1.0)], -np.inf, 0)


def solve_milp(problem: Problem, *, floor: float, time_limit: float) -> MilpResult:
    """Solve the pair objective.

    Args:
        problem: the layer's problem; its token sets are not used.
        floor: value of a known placement; worse ones are not searched.
        time_limit: seconds.
    """
    model = _Model(problem)
    lower, upper = np.zeros(model.columns), np.ones(model.columns)
    lower[model.m], upper[model.m] = 1.0, float(problem.devices)
    answer = milp(
        model.objective(),
        integrality=np.concatenate([np.ones(model.assign), np.zeros(model.columns - model.assign)]),
        bounds=Bounds(lower, upper),
        constraints=model.constraints(floor),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    groups = None
    if answer.x is not None:
        chosen_ED = np.asarray(answer.x)[: model.assign].reshape(model.experts, model.devices)
        groups = [int(d) for d in chosen_ED.argmax(axis=1)]
    dual = answer.get("mip_dual_bound")
    bound = np.inf if dual is None else -float(dual) / SCALE + problem.load_weight
    return MilpResult(groups=groups, bound=float(bound), proven=answer.status == 0)
