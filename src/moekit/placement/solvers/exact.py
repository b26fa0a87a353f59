"""The optimum, proven: exhaustive for few experts, a mixed-integer programme for more."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.placement.local import multi_start
from moekit.placement.milp import solve_milp
from moekit.placement.objective import Problem
from moekit.placement.partitions import best_partition, count_partitions, enumerable
from moekit.placement.solver import Solver


@register(
    name="exact",
    kind="place",
    needs=("coactivation",),
    changes="placement",
    limits=("proves the optimum up to about 24 experts; above that it stops at its time limit and states the gap",),
)
class Exact(Solver):
    """Look at every partition (mirror images left out), or solve a mixed-integer programme with HiGHS.

    The programme starts from what swap search finds and returns the better of both with a proven bound. Exact rows
    (K > 2) are optimised by enumeration only.
    """

    method: Literal["auto", "enumerate", "milp"] = Field(default="auto", description="auto: enumerate while possible")
    time_limit: float = Field(default=60.0, gt=0, description="seconds a layer for the programme")

    def search(self, problem: Problem) -> tuple[list[int], float | None, bool]:
        """Enumerate or solve the programme."""
        possible = enumerable(problem.sizes)
        if self.method == "enumerate" and not possible:
            raise BadConfig(
                f"{count_partitions(problem.sizes):.3g} partitions of {problem.experts} experts are too many to list",
                hint="method='milp' (with a time limit) or the solver 'swap'",
            )
        if possible and self.method != "milp":
            return best_partition(problem), None, True
        if problem.sets is not None:
            raise BadConfig(
                f"exact rows of {problem.experts} experts cannot be enumerated",
                hint="the solver 'swap' optimises them; or objective='pairs'",
            )
        start = multi_start(problem, starts=8, perturbations=16, time_limit=self.time_limit)
        floor = problem.value(start)
        found = solve_milp(problem, floor=floor, time_limit=self.time_limit)
        groups = start
        if found.groups is not None and problem.value(found.groups) > floor:
            groups = found.groups
        return groups, found.bound, found.proven
