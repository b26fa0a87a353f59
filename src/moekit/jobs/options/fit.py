"""Options of `moekit.jobs.fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, PathText, TextRef


class FitOptions(JobOptions):
    """Make a model fit a number of bytes by fewer, merged, narrower and rounded experts together, at the least loss."""

    job: ClassVar[str] = "moekit.jobs.fit"
    command: ClassVar[CommandLine] = CommandLine(
        help="Make a model fit a number of bytes: measure what dropping, merging, narrowing and rounding cost in every "
        "layer, alone and together, find the plan of least cost under what the engine loads, measure the best few "
        "plans on held-out text beside what each kind alone makes of the same bytes, write the best, and check it.",
        writes="folder of the model that fits",
        arguments=("model",),
        instead="--plan",
        hidden=("write",),
        flags={"engine": "--for"},
        examples=(
            "moekit fit ./moe --bytes 12GiB --data my-domain/ -o ./fits",
            "moekit fit ./moe --bytes 8GiB --for llama.cpp --data demo --costs costs.json -o ./fits",
            "moekit fit ./moe --bytes 10GiB --for moekit --widths 1 --bits 4,3 --data demo --plan ./p.json",
            "moekit fit ./moe --bytes 12GiB --data my-domain/ --heal experts --heal-settings '{steps: 500}' -o ./fits",
        ),
    )

    model: ModelRef = Field(description="MoE: folder or hub id")
    bytes: int | str = Field(description="bytes of the result's weight files, such as 12GiB")
    engine: Literal["stock", "vllm", "llama.cpp", "moekit"] = Field(
        default="stock",
        description="what is to load the result. stock: a folder of plain weights, one number of experts and one width "
        "for all layers; vllm, llama.cpp: bits besides, layer by layer, counted as they will be packed; moekit: the "
        "number of experts, too, layer by layer",
    )
    data: TextRef = Field(description="text to measure costs on: file, folder, source, mix or hub id")
    heldout: TextRef | None = Field(
        default=None, description="text to measure plans on; by default a tenth of data, which is kept apart for it"
    )
    drop: str = Field(default="reap", description="which experts are dropped; see moekit methods prune")
    merge: str = Field(default="hc-smoe", description="which experts are merged; see moekit methods merge")
    narrow: str = Field(default="slimmoe", description="how experts become narrower; see moekit methods slim")
    rounding: str = Field(default="rtn", description="how weights are rounded; see moekit methods quantize")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="knobs of these methods: drop, merge, narrow or bits -> knob -> value"
    )
    ways: tuple[Literal["drop", "merge"], ...] = Field(
        default=("drop", "merge"), min_length=1, description="how experts go: dropped, merged, or either"
    )
    experts: tuple[float, ...] = Field(
        default=(0.75, 0.5), description="fractions of the experts to try beside what the budget holds; 1 for no fewer"
    )
    widths: tuple[float, ...] = Field(
        default=(0.75, 0.5), description="fractions of the experts' neurons to try; 1 for no narrower"
    )
    bits: tuple[int, ...] = Field(default=(), description="bits to try; all that the engine holds by default")
    group: int | None = Field(
        default=None, ge=0, description="inputs that share a scale; by default the largest of 128, 64, ... that fits"
    )
    choices: int = Field(default=24, ge=4, description="recipes that are measured in each layer")
    price: Literal["auto", "fisher", "change"] = Field(
        default="auto",
        description="fisher: squared products of changes and gradients, in nats, which needs the whole model in "
        "memory once; change: of the residual stream, layer by layer; auto: fisher where it fits",
    )
    tries: int = Field(default=3, ge=1, description="plans of least expected cost that are measured")
    random_plans: int = Field(
        default=6, ge=0, description="random plans of the same bytes that are measured, too: they tell whether to trust"
    )
    front: int = Field(default=8, ge=2, description="budgets for which the expected cost is told")
    costs: PathText | None = Field(
        default=None, description="file of measured costs: read where it is there, and written, for further budgets"
    )
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens of data, at most, shared by its domains")
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    heal: Literal["none", "router", "norms", "experts", "lora", "all"] = Field(
        default="none",
        description="weights that learn, once the model fits, to answer as the unchanged one does: see moekit heal",
    )
    heal_settings: dict[str, Any] = Field(
        default_factory=dict, description="steps, lr, loss, lm, ...: those of moekit heal"
    )
    unhealed: PathText | None = Field(
        default=None,
        description="folder of the model before healing, which the healed one's record names as its parent; by "
        "default OUT-unhealed",
    )
    plan: PathText | None = Field(default=None, description="also write the plan to this file")
    write: Literal["model", "plan"] = Field(default="model", description="write the model, or the plan alone")
    proof: bool = Field(default=True, description="measure plans; without, the one of least expected cost is taken")
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the proof in tokens (default: the model's, ≤ 1024)"
    )
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    @field_validator("experts", "widths")
    @classmethod
    def _fractions(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError("fractions lie above 0 and are at most 1")
        return values

    @field_validator("bits")
    @classmethod
    def _bits(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not all(1 <= value <= 8 or value == 16 for value in values):
            raise ValueError("bits are 1 to 8, or 16 for none fewer than stored")
        return values

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """The plan, where it is written beside a model, and the model before it was healed."""
        unhealed = out.with_name(f"{out.name}-unhealed") if self.unhealed is None else Path(self.unhealed).expanduser()
        return (*(() if self.plan is None else (Path(self.plan),)), *(() if self.heal == "none" else (unhealed,)))
