"""By a constant factor."""

from __future__ import annotations

from pydantic import model_validator

from moekit.catalogue import register
from moekit.training.schedules.base import KIND, Ramp


@register(name="exp", kind=KIND, changes="runtime", limits=("Both ends must lie on the same side of 0.",))
class Exponential(Ramp):
    """By the same factor in each step: start (end / start)^t, fast first and slow at the end where it falls.

    The way temperatures are annealed.
    """

    @model_validator(mode="after")
    def _same_side(self) -> Exponential:
        if self.start * self.end <= 0:
            raise ValueError(f"there is no constant factor from {self.start} to {self.end}")
        return self

    def between(self, share: float) -> float:
        """Start (end / start)^t."""
        return float(self.start * (self.end / self.start) ** share)
