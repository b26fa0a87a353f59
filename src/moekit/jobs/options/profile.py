"""Options of `moekit.jobs.profile`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, PlanRef, TextRef


class ProfileOptions(JobOptions):
    """Run a model over text and keep which experts each token chose, and statistics of it."""

    job: ClassVar[str] = "moekit.jobs.profile"
    command: ClassVar[CommandLine] = CommandLine(
        help="Record which experts each token of a text chooses: a trace on disk, and statistics of it.",
        writes="folder of the trace",
        arguments=("model",),
        examples=("moekit profile allenai/OLMoE-1B-7B-0924 --data wikitext --max-tokens 100000 -o ./trace",),
    )

    model: ModelRef = Field(description="MoE: folder or hub id")
    data: TextRef = Field(description="file, folder, source, mix or hub id")
    plan: PlanRef | None = Field(default=None, description="routing plan to route by; the checkpoint's own by default")
    split: Literal["train", "heldout"] | None = Field(default=None, description="part of the text to take")
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens, at most, shared among the documents")
    seq_len: int = Field(default=512, ge=2, description="tokens a row")
    batch_size: int = Field(default=4, ge=1, description="rows a forward pass")
    statistics: tuple[str, ...] = Field(
        default=("basic",),
        description="what to sum up: names or groups, such as basic, gates, outputs (moekit methods statistics)",
    )
    choices: bool = Field(default=True, description="keep every token's choice, for replay and placement")
    weights: bool = Field(default=False, description="keep the gate weights too, 16 bits each")
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)
