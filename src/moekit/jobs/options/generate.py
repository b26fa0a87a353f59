"""Options of `moekit.jobs.generate`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.jobs.options.base import ModelRef, PromptsRef
from moekit.jobs.options.ranked import RankedOptions
from moekit.jobs.options.tasks import TaskOptions


class GenerateOptions(TaskOptions, RankedOptions):
    """Continue prompts with a model, and put beside it what another one says; greedily, so it can be repeated."""

    job: ClassVar[str] = "moekit.jobs.generate"
    needs_out: ClassVar[bool] = False

    model: ModelRef = Field(description="checkpoint: folder, hub id or packaged model")
    other: ModelRef | None = Field(default=None, description="checkpoint to put beside it")
    prompt: tuple[str, ...] = Field(default=(), description="texts to continue; with no prompt at all, three of ours")
    prompts: PromptsRef | None = Field(default=None, description="file with one prompt a line")
    max_new_tokens: int = Field(default=48, ge=1, description="longest continuation, in tokens")
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
