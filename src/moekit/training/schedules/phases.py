"""One schedule after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moekit.catalogue import register
from moekit.training.schedules.base import KIND, Schedule, read_schedule


class Phase(BaseModel):
    """One phase.

    Attributes:
        until: share of the run at which it ends.
        schedule: what it does; it sees its own beginning as 0 and its end as 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    until: float = Field(gt=0, le=1, description="share of the run at which it ends")
    schedule: dict[str, Any] = Field(description="what it does: `use` and its settings")


@register(name="phases", kind=KIND, changes="runtime")
class Phases(Schedule):
    """One schedule after the other, each over a share of the run; each sees its own beginning as 0 and its end as 1."""

    phases: tuple[Phase, ...] = Field(min_length=1, description="{until: 0.3, schedule: {use: ...}}, in order; last: 1")

    @classmethod
    def examples(cls) -> Sequence[Phases]:
        """A ramp in its second half."""
        still, ramp = {"use": "constant", "at": 1.0}, {"use": "linear", "start": 1.0, "end": 0.0}
        return [cls(phases=(Phase(until=0.5, schedule=still), Phase(until=1.0, schedule=ramp)))]

    @model_validator(mode="after")
    def _in_order(self) -> Phases:
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError("the phases must end one after the other, the last at 1")
        for phase in self.phases:
            read_schedule(phase.schedule)
        return self

    def value(self, progress: float) -> float:
        """The value of the phase that is on."""
        begin = 0.0
        for phase in self.phases:
            if progress < phase.until or phase.until == 1:
                share = min((progress - begin) / (phase.until - begin), 1.0)
                return read_schedule(phase.schedule).value(share)
            begin = phase.until
        raise AssertionError("the last phase ends at 1")
