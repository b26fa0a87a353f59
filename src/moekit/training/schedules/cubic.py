"""Fast first, then slower: the schedule of gradual pruning."""

from __future__ import annotations

from moekit.catalogue import register
from moekit.training.schedules.base import KIND, Ramp


@register(name="cubic", kind=KIND, paper="arXiv:1710.01878", changes="runtime")
class Cubic(Ramp):
    """Fast first, then ever slower: end + (start - end) (1 - t)^3, the schedule of gradual pruning (Zhu and Gupta)."""

    def shape(self, share: float) -> float:
        """1 - (1 - t)^3."""
        return 1 - (1 - share) ** 3
