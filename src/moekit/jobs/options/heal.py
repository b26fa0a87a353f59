"""Options of `moekit.jobs.heal`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, PathText, TextRef


class HealOptions(JobOptions):
    """Give a compressed model back part of what it lost: train a few of its weights to answer as its parent does."""

    job: ClassVar[str] = "moekit.jobs.heal"
    command: ClassVar[CommandLine] = CommandLine(
        help="Give a compressed model back part of what it lost: some of its weights, by default its routers alone, "
        "learn to answer as the model it was made from, and held-out text proves what that brings. A folder that "
        "moekit wrote names its parent. Shapes and dtypes stay; a killed run goes on when called again alike.",
        writes="folder of the healed model",
        arguments=("model",),
        examples=(
            "moekit heal ./half --data ./text -o ./healed",
            "moekit heal ./half --teacher ./moe --data ./text --what lora --tokens 5000000 -o ./healed",
            "moekit heal ./half --data ./text --teacher-cache ./said --top-k 64 --steps 200 --lm 0.5 -o ./healed",
        ),
        settings="moekit.training.healing:HealConfig",
        panel="Training",
    )

    model: ModelRef = Field(description="compressed model: folder or hub id")
    teacher: ModelRef | None = Field(
        default=None, description="model that it was made from: folder or hub id; by default the one its record names"
    )
    data: TextRef = Field(description="text near the use: file, folder, source, mix or hub id")
    what: Literal["router", "experts", "lora", "norms", "all"] = Field(
        default="router", description="weights that learn; all others stay bit for bit as they are"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="steps, lr, loss, lm, ...: HealConfig")
    keep_adapter: PathText | None = Field(
        default=None,
        description="also write the adapter, as peft and servers read it, to this folder; only with --what lora",
    )
    teacher_cache: PathText | None = Field(
        default=None,
        description="folder for the teacher's likeliest tokens: asked once, then gone from memory; kept for other runs",
    )
    heldout: TextRef | None = Field(
        default=None, description="text to prove the result on; by default a tenth of data, which is kept apart for it"
    )
    proof: bool = Field(default=True, description="measure parent, student and healed model on held-out text")
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the proof in tokens (default: the model's, ≤ 1024)"
    )
    control: bool = Field(
        default=False,
        description="also train the parent on the same steps, to tell what the text alone brings; only with --lm",
    )
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    drop_unknown: bool = Field(
        default=False,
        description="leave out what the source holds beyond the model, such as extra layers",
    )

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """The adapter, where it is kept beside the merged model."""
        return () if self.keep_adapter is None else (Path(self.keep_adapter).expanduser(),)
