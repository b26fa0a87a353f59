"""What a step is: the options of a job, a name, and a seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from pydantic import Field

from moekit.jobs.context import JobContext
from moekit.jobs.options.base import JobOptions
from moekit.jobs.shared.estimates import Forecast, Sizes


class Step(JobOptions, ABC):
    """Base of all steps.

    Attributes:
        id: name of the step in its recipe; its output folder is called so.
        seed: overrides the recipe's seed for this step.
    """

    id: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$", description="name of the step; its folder is called so")
    seed: int | None = Field(default=None, ge=0, description="seed of this step; the recipe's by default")

    def check(self) -> None:
        """Refuse what cannot work, before any step runs.

        Raises:
            BadConfig: naming the option and what was given.
        """

    @abstractmethod
    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Say what the step would read, write and need, from file sizes and headers alone.

        Args:
            out: where it would write.
            sizes: sizes of what is there or will be.
        """

    @abstractmethod
    def run(self, work: JobContext) -> dict[str, Any]:
        """Do it.

        Returns:
            Figures for the report and for --json: plain values only.
        """
