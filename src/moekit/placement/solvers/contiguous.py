"""Experts in their own order: what expert parallelism does without a placement."""

from __future__ import annotations

import numpy as np

from moekit.catalogue import register
from moekit.placement.objective import Problem
from moekit.placement.solver import Solver


@register(name="contiguous", kind="place", changes="placement", limits=("looks at no statistics",))
class Contiguous(Solver):
    """Give device d the d-th block of experts, as a model without a placement does.

    The baseline every other solver is measured against.
    """

    def search(self, problem: Problem) -> tuple[list[int], float | None, bool]:
        """Blocks in expert order."""
        return np.repeat(np.arange(problem.devices), problem.sizes).tolist(), None, False
