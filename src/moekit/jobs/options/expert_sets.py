"""Options of `moekit.jobs.expert_sets`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, TextRef


class ExpertSetsOptions(JobOptions):
    """Record what the routers make of a task's text, and keep the ranks of all experts, one set for each task."""

    job: ClassVar[str] = "moekit.jobs.expert_sets"
    command: ClassVar[CommandLine] = CommandLine(
        help="Record what the routers make of each task's text and keep the ranks of all experts: a few hundred "
        "kilobytes a task, which serve every budget. moekit generate --expert-sets then loads the experts of a "
        "prompt's task alone.",
        writes="folder of expert sets; tasks are added to it",
        arguments=("model",),
        hidden=("existing",),
        overwrite="Replace tasks that the folder holds already.",
        examples=(
            "moekit expert-sets ./moe --task maths --data my-maths/ -o ./expert-sets",
            "moekit expert-sets ./moe --data my-domains/ --generalist -o ./expert-sets",
            "moekit expert-sets ./moe --task maths --method reap --data my-maths/ -o ./by-reap",
        ),
    )

    model: ModelRef = Field(description="MoE: folder or hub id")
    data: TextRef = Field(description="text of the task, or of several, each a domain of it")
    task: str | None = Field(
        default=None, min_length=1, description="name of the task; without it each domain of data is a task"
    )
    method: str = Field(default="premoe", description="what scores the experts; see moekit methods prune")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own knobs")
    generalist: bool = Field(default=False, description="also store an expert set of all tasks of the folder together")
    further: bool = Field(
        default=True,
        description="keep the scores of all layers: without them prompts are compared at the first alone, and tasks "
        "cannot be pooled later",
    )
    existing: Literal["anew", "add", "replace"] | None = Field(
        default=None,
        description="expert sets that the folder holds: make it anew, add to them, or replace tasks of the same name "
        "too; by default a call adds, with overwrite replaces, and a recipe's step makes its folder anew",
    )
    max_tokens: int | None = Field(
        default=65536, ge=1, description="tokens of each task, at most, shared among its documents"
    )
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    def identity(self) -> dict[str, Any]:
        """What is done with expert sets that are there already does not change what is recorded."""
        return {key: value for key, value in super().identity().items() if key != "existing"}
