"""Pairwise-swap local search from several starts."""

from __future__ import annotations

import math
import time

import numpy as np
from pydantic import Field

from moekit.catalogue import register
from moekit.placement.local import EPSILON, descend, kick, state_of
from moekit.placement.objective import Ints, Problem
from moekit.placement.solver import Solver
from moekit.placement.solvers.greedy import greedy_groups


@register(name="swap", kind="place", paper="arXiv:2504.01337", needs=("coactivation",), changes="placement")
class Swap(Solver):
    """Let the two experts change places that gain most, until no swap helps; from several starts, then with kicks.

    Starts are the contiguous blocks, the greedy groups and random ones. The best local optimum is then kicked (a few
    random swaps, another descent, kept where better). The exact row objective starts where the search by pairs ended,
    so that it never sends more rows than that. Finds all optima of LLaMA-MoE's 32 layers on 2 and 4 devices.
    """

    starts: int = Field(default=8, ge=0, description="random starts beside contiguous and greedy")
    kicks: int = Field(default=16, ge=0, description="random disturbances of the best, each followed by a descent")
    time_limit: float = Field(default=60.0, gt=0, description="seconds a layer")

    def search(self, problem: Problem) -> tuple[list[int], float | None, bool]:
        """Search by pairs; then, where tokens are given, by exact rows from there."""
        deadline = time.monotonic() + self.time_limit
        rng = np.random.default_rng(problem.seed)
        blocks = np.repeat(np.arange(problem.devices), problem.sizes)
        starts = [blocks, np.array(greedy_groups(problem)), *(rng.permutation(blocks) for _ in range(self.starts))]
        pairs = Problem(problem.weight_EE, problem.sizes, problem.load_E, problem.load_weight, seed=problem.seed)
        group_E = self._best(pairs, starts, self.kicks, rng, deadline)
        if problem.sets is not None:
            few = max(1, self.kicks // 4) if self.kicks else 0
            group_E = self._best(problem, [group_E, blocks], few, rng, deadline)
        return group_E.tolist(), None, False

    def _best(
        self, problem: Problem, starts: list[Ints], kicks: int, rng: np.random.Generator, deadline: float
    ) -> Ints:
        best_E, best_value = starts[0], -math.inf
        for start_E in starts:
            state = state_of(problem, start_E)
            descend(problem, state, deadline)
            value = problem.value(state.group_E)
            if value > best_value + EPSILON:
                best_E, best_value = state.group_E.copy(), value
            if time.monotonic() > deadline:
                return best_E
        for _ in range(kicks):
            state = state_of(problem, best_E)
            kick(state, max(2, problem.experts // 16), rng)
            descend(problem, state, deadline)
            value = problem.value(state.group_E)
            if value > best_value + EPSILON:
                best_E, best_value = state.group_E.copy(), value
            if time.monotonic() > deadline:
                break
        return best_E
