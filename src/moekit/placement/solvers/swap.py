"""Pairwise-swap local search from several starts."""

from __future__ import annotations

from pydantic import Field

from moekit.catalogue import register
from moekit.placement.local import multi_start
from moekit.placement.objective import Problem
from moekit.placement.solver import Solver


@register(name="swap", kind="place", paper="arXiv:2504.01337", needs=("coactivation",), changes="placement")
class Swap(Solver):
    """Let the two experts change places that gain most, until no swap helps; from several starts, then perturbed.

    Starts are the contiguous blocks, the greedy groups and random ones. The best local optimum is then perturbed (a few
    random swaps, another descent, kept where better). The exact row objective starts where the search by pairs ended,
    so that it never sends more rows than that. Finds all optima of LLaMA-MoE's 32 layers on 2 and 4 devices.
    """

    starts: int = Field(default=8, ge=0, description="random starts beside contiguous and greedy")
    perturbations: int = Field(
        default=16, ge=0, description="random disturbances of the best, each followed by a descent"
    )
    time_limit: float = Field(default=60.0, gt=0, description="seconds a layer")

    def search(self, problem: Problem) -> tuple[list[int], float | None, bool]:
        """Search by pairs; then, where tokens are given, by exact rows from there."""
        found = multi_start(problem, starts=self.starts, perturbations=self.perturbations, time_limit=self.time_limit)
        return found, None, False
