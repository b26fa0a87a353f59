"""Values that jump."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from pydantic import Field, model_validator

from moekit.catalogue import register
from moekit.training.schedules.base import KIND, Schedule


@register(name="steps", kind=KIND, changes="runtime")
class Steps(Schedule):
    """Values that jump at given moments; without moments all last equally long.

    For what has no values between, and for learning rates that are cut to a tenth.
    """

    values: tuple[float, ...] = Field(min_length=1, description="the values, in order")
    at: tuple[float, ...] | None = Field(
        default=None, description="shares of the run at which the second, third, ... value begins"
    )

    @classmethod
    def examples(cls) -> Sequence[Steps]:
        """Of any values."""
        return [cls(values=(1.0, 2.0, 4.0))]

    @model_validator(mode="after")
    def _in_order(self) -> Steps:
        if self.at is not None:
            if len(self.at) != len(self.values) - 1:
                raise ValueError(f"{len(self.values)} values need {len(self.values) - 1} moments, not {len(self.at)}")
            if list(self.at) != sorted(self.at) or not all(0 <= moment <= 1 for moment in self.at):
                raise ValueError("the moments must rise, from 0 to 1")
        return self

    def value(self, progress: float) -> float:
        """The value that has begun last."""
        count = len(self.values)
        moments = self.at if self.at is not None else tuple(place / count for place in range(1, count))
        return self.values[bisect_right(moments, progress)]
