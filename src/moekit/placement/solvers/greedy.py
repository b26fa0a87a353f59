"""Heaviest pair first, with repair of what the pairs leave over."""

from __future__ import annotations

from moekit.catalogue import register
from moekit.placement.greedy import greedy_groups
from moekit.placement.objective import Problem
from moekit.placement.solver import Solver


@register(
    name="greedy",
    kind="place",
    paper="arXiv:2504.01337",
    needs=("coactivation",),
    changes="placement",
    limits=("no optimum: a start for swap search",),
)
class Greedy(Solver):
    """Take the heaviest pairs first: open a group, join the partner's group, or join the closest group with room.

    Every pair is looked at once, so that it ends on any input, and experts that no pair placed (all their pairs
    count zero, or met full groups) are given the free place they are closest to. The load term is not looked at.
    """

    def search(self, problem: Problem) -> tuple[list[int], float | None, bool]:
        """One pass over the pairs, then repair."""
        return greedy_groups(problem), None, False
