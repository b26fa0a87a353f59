"""The knobs of a training run, and what a run leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moekit import catalogue
from moekit.data.encoding import BOS_HELP, Bos
from moekit.training.balancers.base import read_balancer
from moekit.training.figures import RoutingFigures
from moekit.training.lora import LoraSettings
from moekit.training.objectives.base import read_objectives, stated
from moekit.training.objectives.ce import CrossEntropy
from moekit.training.schedules.base import Schedule, read_schedule
from moekit.training.terms import Terms, moved_objectives


class TrainConfig(BaseModel):
    """How to train.

    Give one of `steps`, `epochs` and `tokens`; without any it is one epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    epochs: float | None = Field(default=None, gt=0, description="passes over the text")
    tokens: int | None = Field(default=None, ge=1, description="tokens in all, rounded up to whole steps")

    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    router_lr: float | None = Field(default=None, gt=0, description="peak learning rate of routers; lr by default")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="after the warm-up")
    warmup: float = Field(default=0.03, ge=0, description="steps, or below 1 the share of them, until the peak")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's, on matrices")
    beta2: float = Field(default=0.999, gt=0, lt=1, description="AdamW's memory of squared gradients")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 for none")

    seq_len: int = Field(default=256, ge=2, description="tokens of a row")
    batch: int = Field(default=4, ge=1, description="rows of a micro-batch, on each device")
    accumulation: int = Field(default=1, ge=1, description="micro-batches of an optimizer step")
    end_token: bool = Field(default=True, description="mark the ends of documents")
    bos: Bos = Field(default="auto", description=BOS_HELP)
    pad: bool = Field(default=False, description="start each document in a row of its own")

    objectives: dict[str, Any] = Field(
        default_factory=dict,
        description="what is minimised beside the cross-entropy: NAME -> weight, or settings",
    )
    balancer: dict[str, Any] | None = Field(
        default=None,
        description="rule that moves selection biases after each step: NAME, or settings (moekit methods balancer)",
    )
    schedules: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="settings that move during the run: lr, objective.NAME.weight, ... -> settings with `use` "
        "(moekit methods schedule)",
    )

    parts: tuple[str, ...] = Field(default=("all",), description="what trains: router, experts:20-29, ...; or all")
    lora: LoraSettings | None = Field(default=None, description="train adapters, merged at the end, instead of parts")

    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of matrix products (weights stay fp32); auto: bf16 where the device has instructions for it",
    )
    activation_checkpointing: bool = Field(default=False, description="less memory for a second forward")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the order of rows and of every random draw")
    save_every: int | None = Field(default=100, ge=1, description="steps between checkpoints; none: only at the end")
    eval_every: int | None = Field(default=None, ge=1, description="steps between losses on held-out text, if given")

    @model_validator(mode="before")
    @classmethod
    def _named_objectives(cls, values: Any) -> Any:
        """`balance: 0.01` beside the settings means the same as `objectives: {balance: 0.01}`."""
        if not isinstance(values, Mapping) or all(name in TrainConfig.model_fields for name in values):
            return values
        known = {record.name for record in catalogue.methods("objective")}
        named = {n: v for n, v in values.items() if n not in TrainConfig.model_fields and n.replace("_", "-") in known}
        rest = {name: value for name, value in values.items() if name not in named}
        objectives = {**(values.get("objectives") or {}), **{n.replace("_", "-"): v for n, v in named.items()}}
        return {**rest, "objectives": objectives} if named else values

    @field_validator("objectives", mode="after")
    @classmethod
    def _known_objectives(cls, value: dict[str, Any]) -> dict[str, Any]:
        return stated(read_objectives(value))

    @field_validator("balancer", mode="before")
    @classmethod
    def _known_balancer(cls, value: Any) -> dict[str, Any] | None:
        if value is None or (isinstance(value, Mapping) and not value):
            return None
        rule = read_balancer(value)
        return {"use": catalogue.of(type(rule)).name, **rule.model_dump(mode="json")}

    @model_validator(mode="after")
    def _known_schedules(self) -> TrainConfig:
        for settings in self.schedules.values():
            read_schedule(settings)
        if "lr" in self.schedules and self.model_fields_set & {"lr_schedule", "warmup"}:
            raise ValueError("schedules.lr takes the place of lr_schedule and warmup: give one or the other")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one of them")
        return self

    @model_validator(mode="after")
    def _parts_or_lora(self) -> TrainConfig:
        if self.lora is not None and self.parts != ("all",):
            raise ValueError("lora trains adapters alone: name its parts in lora.parts")
        return self

    def terms(self) -> Terms:
        """The objectives of a run: the cross-entropy, unless left out, and those that are named."""
        named = read_objectives(self.objectives)
        return Terms({"ce": named.pop("ce", CrossEntropy()), **named}, moved_objectives(self.schedules))

    def moving(self) -> dict[str, Schedule]:
        """Target -> schedule."""
        return {target: read_schedule(settings) for target, settings in self.schedules.items()}

    def planned_steps(self, rows: int, world: int = 1) -> int:
        """Optimizer steps for a text of so many rows.

        Args:
            rows: rows of `seq_len` tokens.
            world: processes that train together.
        """
        per_step = self.batch * self.accumulation * world
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return math.ceil(self.tokens / (per_step * self.seq_len))
        return max(math.ceil(rows * (self.epochs or 1.0) / per_step), 1)

    def warmup_steps(self, steps: int) -> int:
        """Steps until the peak, for a run of so many."""
        # A share is never the whole run, however short: its first step has a rate of 0.
        return min(math.ceil(self.warmup * steps), steps - 1) if self.warmup < 1 else int(self.warmup)


class TrainResult(BaseModel):
    """What a run did.

    Attributes:
        steps: optimizer steps, of this process and those it continued.
        tokens: tokens trained on, padding left out.
        seconds: time spent in steps, over all processes that worked on the run.
        losses: loss of each step without what routers add: the cross-entropy, where it is the only objective on
            outputs.
        heldout_losses: step -> loss on held-out text.
        history: what was logged at each step.
        routing: routing figures of the last steps.
        precision: of matrix products.
        trained: part -> parameters that trained.
        parameters: parameters of the model.
        resumed_from: step this process continued from, None if it began.
        notes: what a reader of the figures must know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    tokens: int
    seconds: float
    losses: list[float]
    heldout_losses: dict[int, float]
    history: list[dict[str, float]]
    routing: RoutingFigures | None
    precision: Literal["fp32", "bf16"]
    trained: dict[str, int]
    parameters: int
    resumed_from: int | None
    notes: list[str] = []

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, over the whole run."""
        return self.tokens / max(self.seconds, 1e-9)
