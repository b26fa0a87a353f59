"""One value."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from moekit.catalogue import register
from moekit.training.schedules.base import KIND, Schedule


@register(name="constant", kind=KIND, changes="runtime")
class Constant(Schedule):
    """One value for the whole time.

    For a phase of `phases` in which nothing moves, or to train with another value than the model's own: a
    `routing.top_k` of 4, say.
    """

    at: float = Field(allow_inf_nan=False, description="the value")

    @classmethod
    def examples(cls) -> Sequence[Constant]:
        """Of any values."""
        return [cls(at=3.0)]

    def value(self, progress: float) -> float:
        """The value."""
        return self.at
