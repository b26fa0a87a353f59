"""Along half a cosine."""

from __future__ import annotations

import math

from moekit.catalogue import register
from moekit.training.schedules.base import KIND, Ramp


@register(name="cosine", kind=KIND, paper="arXiv:1608.03983", changes="runtime")
class Cosine(Ramp):
    """Along half a cosine: slow at both ends and fastest in the middle.

    The usual way of a learning rate from its peak to 0 (without restarts).
    """

    def shape(self, share: float) -> float:
        """(1 - cos(pi t)) / 2."""
        return (1 - math.cos(math.pi * share)) / 2
