"""Options of `moekit.jobs.families`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moekit.jobs.options.base import JobOptions


class FamiliesOptions(JobOptions):
    """Try every Mixture-of-Experts family of the installed transformers on a tiny model, and say what works."""

    job: ClassVar[str] = "moekit.jobs.families"
    needs_out: ClassVar[bool] = False

    names: tuple[str, ...] = Field(default=(), description="model types, as configs say them; all by default")
    only: Literal["works", "refused", "failed"] | None = Field(
        default=None,
        description="tell only of families where all works, where something is refused, or where something failed",
    )
