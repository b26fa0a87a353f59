"""Which of a model's experts are loaded for a prompt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moekit.jobs.options.base import ExpertsRef, JobOptions, SetsRef


class TaskOptions(JobOptions):
    """Which of a model's experts are loaded for a prompt."""

    expert_sets: SetsRef | None = Field(
        default=None,
        description="folder of expert sets (moekit expert-sets): load only the experts of each prompt's task",
    )
    keep: int | float | str | None = Field(
        default=None, description="what is loaded: experts a layer (64), their fraction (0.5), or bytes (12GiB)"
    )
    task: str | None = Field(default=None, description="the task of all prompts; without it each prompt's is retrieved")
    retrieval_layers: int = Field(default=1, ge=1, description="MoE layers, from the first, by which it is retrieved")
    metric: Literal["l2", "cosine"] | None = Field(
        default=None,
        description="distance of a prompt from a task; by default l2 for premoe, cosine for other methods, whose "
        "scores grow with the text",
    )
    max_distance: float | None = Field(
        default=None, ge=0, description="a prompt farther than this from all tasks gets the generalist's experts"
    )
    protect: ExpertsRef | None = Field(
        default=None, description="experts that are always loaded: pairs such as 1:68,2:92, or a JSON file"
    )
    top_k: int | None = Field(default=None, ge=1, description="choices a token makes; as before by default")
    other_weights: bool = Field(
        default=False,
        description="accept expert sets of a model of the same shape and other weights, such as the original of a "
        "quantized copy",
    )
