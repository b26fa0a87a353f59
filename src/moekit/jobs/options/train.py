"""Options of `moekit.jobs.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from moekit._device import DEVICE_HELP
from moekit.jobs.options.base import CommandLine, ModelRef, PathText, PlanRef, TextRef
from moekit.jobs.options.ranked import RankedOptions


class TrainOptions(RankedOptions):
    """Train a model on text, under the routing policy that it carries or is given; a killed run resumes exactly."""

    job: ClassVar[str] = "moekit.jobs.train"
    command: ClassVar[CommandLine] = CommandLine(
        help="Train or fine-tune a model on text. A killed run goes on where it was, when called again alike.",
        writes="folder of the trained checkpoint",
        arguments=("model",),
        examples=(
            "moekit train ./moe --data demo --split train --tokens 100000 --lr 2e-4 --balance 0.01 -o ./tuned",
            "moekit train ./moe --data ./text --plan ./plan --steps 50 --parts router,experts -o ./tuned",
            "moekit train ./moe --data ./text --experts '{use: factored, rank: 32}' --steps 500 -o ./factored",
        ),
        settings="moekit.training.flags:TrainFlags",
        panel="Training",
    )

    model: ModelRef = Field(description="model: folder or hub id")
    data: TextRef = Field(description="training text: file, folder, source, mix or hub id")
    texts: dict[str, TextRef] | None = Field(
        default=None, description="further texts by name, which objectives read by their setting `text`"
    )
    teacher: ModelRef | None = Field(
        default=None, description="model that the objective kd holds the output against: folder or hub id"
    )
    teacher_top_k: int | None = Field(
        default=None, ge=1, description="ask the teacher beforehand and keep so many of its likeliest tokens on disk"
    )
    plan: PlanRef | None = Field(default=None, description="routing plan to train under; the checkpoint's by default")
    experts: dict[str, Any] | None = Field(
        default=None,
        description="what to put in the experts' place before training: NAME, or settings (moekit methods experts)",
    )
    basis_plan: PlanRef | None = Field(
        default=None, description="merge plan whose groups share a basis, with --experts '{use: factored, ...}'"
    )
    split: Literal["train", "heldout"] | None = Field(default=None, description="part of the text to take")
    heldout: TextRef | None = Field(default=None, description="text whose loss is watched")
    device: str = Field(default="auto", description=DEVICE_HELP)
    data_parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="under --ep: what is no expert lies whole on every rank, or is dealt out (FSDP2)"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="steps, lr, objectives, ...: TrainConfig")
    saved_as: Literal["source", "float32"] = Field(
        default="source",
        description="dtype of the trained weights: that of the model, or float32, in which they learnt, to go on from",
    )
    keep_adapter: PathText | None = Field(
        default=None, description="also write the adapter, as peft and servers read it, to this folder; only with lora"
    )
    drop_unknown: bool = Field(
        default=False,
        description="leave out what the source holds beyond the model, such as extra layers",
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`compressed-experts` means the same as `{use: compressed-experts}`."""
        return {"use": value} if isinstance(value, str) else value

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """The adapter, where it is kept beside the merged model."""
        return () if self.keep_adapter is None else (Path(self.keep_adapter).expanduser(),)

    def identity(self) -> dict[str, Any]:
        """Where ranks share the model, their number and way are none of it: others may go on with the run."""
        told = self.model_dump(mode="json", exclude={"device"})
        if self.ep == 1:
            return told
        for name in (*RankedOptions.model_fields, "data_parallel"):
            del told[name]
        told["settings"] = {k: v for k, v in told["settings"].items() if k not in ("batch", "accumulation")}
        return told
