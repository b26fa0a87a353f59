"""Options of `moekit.jobs.convert`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit._device import DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, TextRef


class ConvertOptions(JobOptions):
    """Make a MoE of a dense model by one of the conversions in the catalogue (`moekit methods convert`)."""

    job: ClassVar[str] = "moekit.jobs.convert"
    command: ClassVar[CommandLine] = CommandLine(
        help="Turn a dense model into a MoE, by one of these methods.",
        writes="folder of the new checkpoint",
        arguments=("model",),
        by_method="convert",
        example=lambda record: f"moekit convert {record.name} ./dense --experts 32 --top-k 4 --data demo -o ./moe",
    )

    model: ModelRef = Field(description="dense model: folder, hub id or packaged model")
    method: str = Field(description="conversion; see moekit methods convert")
    settings: dict[str, Any] = Field(default_factory=dict, description="the conversion's own options")
    data: TextRef | None = Field(default=None, description="calibration text, for conversions that look at activations")
    split: Literal["train", "heldout"] | None = Field(default="train", description="part of the text to take")
    max_tokens: int = Field(default=8192, ge=1, description="calibration tokens, at most")
    seq_len: int = Field(default=256, ge=2, description="tokens a row")
    bos: Bos = Field(default="auto", description=BOS_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)
    drop_unknown: bool = Field(
        default=False,
        description="leave out what the source holds beyond the model, such as extra layers",
    )
