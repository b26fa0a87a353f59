"""Options of `moekit.jobs.check`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from moekit.jobs.options.base import JobOptions, ModelRef


class CheckOptions(JobOptions):
    """Prove that a checkpoint is what its record says, or find what is wrong with it."""

    job: ClassVar[str] = "moekit.jobs.check"
    needs_out: ClassVar[bool] = False

    folder: ModelRef = Field(description="model folder")
    parent: ModelRef | None = Field(default=None, description="trusted version to compare with: folder or hub id")
    for_: str | None = Field(default=None, description="also say what keeps transformers or vllm from it")
    strict: bool = Field(default=False, description="raise what is wrong, so that a recipe stops there")

    def check(self) -> None:
        """Nothing is known of a folder before it is read."""
