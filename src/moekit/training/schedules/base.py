"""Settings that move during a run: pure functions of the share that is done, so that a resumed run sees the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moekit import catalogue
from moekit.errors import BadConfig

KIND = "schedule"


class Schedule(BaseModel, ABC):
    """A value for each moment of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Settings that the generic tests try; the defaults, unless fields are required."""
        return [cls()]

    @abstractmethod
    def value(self, progress: float) -> float:
        """The value when a share of the run is done.

        Args:
            progress: steps done by all steps: 0 in the first step, 1 after the last.
        """


class Ramp(Schedule):
    """From one value to another between two moments; before and after it stands still.

    Attributes:
        start: value until `after`.
        end: value from `until` on.
        after: share of the run at which it begins to move.
        until: share of the run at which it has arrived.
    """

    start: float = Field(allow_inf_nan=False, description="value at the beginning")
    end: float = Field(allow_inf_nan=False, description="value at the end")
    after: float = Field(default=0.0, ge=0, lt=1, description="share of the run after which it moves")
    until: float = Field(default=1.0, gt=0, le=1, description="share of the run at which it has arrived")

    @model_validator(mode="after")
    def _forwards(self) -> Ramp:
        if self.until <= self.after:
            raise ValueError(f"it would end at {self.until}, before it begins at {self.after}")
        return self

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Down, and up over a part of the run."""
        return [cls(start=2.0, end=0.5), cls(start=1.0, end=8.0, after=0.2, until=0.7)]

    def value(self, progress: float) -> float:
        """The value when a share of the run is done."""
        if progress <= self.after:
            return self.start
        if progress >= self.until:
            return self.end
        return self.between((progress - self.after) / (self.until - self.after))

    def between(self, share: float) -> float:
        """The value at a share of the way, 0 to 1."""
        return self.start + (self.end - self.start) * self.shape(share)

    def shape(self, share: float) -> float:
        """How much of the difference is made at a share of the way: 0 at 0, 1 at 1."""
        return share


def read_schedule(stated: Mapping[str, Any]) -> Schedule:
    """A schedule from a config: its settings with `use: NAME`.

    Raises:
        BadConfig: no such schedule, or a setting that it does not have.
    """
    knobs = dict(stated) if isinstance(stated, Mapping) else {}
    name = knobs.pop("use", None)
    if not isinstance(name, str):
        raise BadConfig("a schedule has no name", hint="lr: {use: linear, start: 1.0e-4, end: 0}")
    made: Schedule = catalogue.make(KIND, name, knobs)
    return made
