"""A random placement: the yardstick that says how much a trace's structure is worth."""

from __future__ import annotations

import numpy as np

from moekit.catalogue import register
from moekit.placement.objective import Problem
from moekit.placement.solver import Solver


@register(name="random", kind="place", changes="placement", limits=("looks at no statistics",), traits=("stochastic",))
class Random(Solver):
    """Deal the experts out at random, block sizes kept, repeatable by seed.

    Expected rows per token of uniformly random distinct choices are D (1 - C(E - E/D, K) / C(E, K)), see
    `moekit.placement.expected_devices`.
    """

    def search(self, problem: Problem) -> tuple[list[int], float | None, bool]:
        """A random permutation of the blocks."""
        blocks = np.repeat(np.arange(problem.devices), problem.sizes)
        return np.random.default_rng(problem.seed).permutation(blocks).tolist(), None, False
