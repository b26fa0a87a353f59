"""Options of `moekit.jobs.pretrain_tiny`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from moekit._device import DEVICE_HELP
from moekit.jobs.options.base import JobOptions, TextRef


class PretrainTinyOptions(JobOptions):
    """Train a tiny model with a vocabulary of its own; a killed run resumes exactly."""

    job: ClassVar[str] = "moekit.jobs.pretrain_tiny"

    data: TextRef = Field(description="text of several domains: folder, source, mix or hub id")
    device: str = Field(default="auto", description=DEVICE_HELP)
    settings: dict[str, Any] = Field(default_factory=dict, description="layout, experts, training, ...: TinyConfig")
