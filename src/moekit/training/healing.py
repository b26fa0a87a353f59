"""Healing: the settings that a run of training takes when it holds a compressed model against the one it was made from.

There is one loop of training; this says what trains in it, how fast, and by which loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from moekit.data.encoding import Bos
from moekit.training.config import TrainConfig
from moekit.training.freeze import train_only
from moekit.training.lora import LoraSettings, add_lora, merge_lora
from moekit.training.resume import load_changing

What = Literal["router", "experts", "lora", "norms", "all"]
Divergence = Literal["bucket", "listed", "full"]

# Peak learning rates: few weights bear large steps, many do not.
RATES: Mapping[What, float] = {"router": 3e-4, "norms": 3e-3, "lora": 2e-4, "experts": 3e-5, "all": 2e-5}
# Without a length, one pass over the text, but not more tokens than these.
MOST_TOKENS: Mapping[What, int] = {
    "router": 1_000_000,
    "norms": 1_000_000,
    "lora": 10_000_000,
    "experts": 10_000_000,
    "all": 10_000_000,
}
# Steps between checkpoints: those of few weights cost little, and are what is left if the loss becomes NaN.
SAVED_EVERY: Mapping[What, int] = {"router": 10, "norms": 10, "lora": 50, "experts": 100, "all": 100}
ADAPTERS = LoraSettings(rank=16, alpha=32.0, parts=("attention", "shared"))
# Noise that some blocks add while they train, by the names of its settings. PhiMoE's `router_jitter_noise` is none of
# them: its threshold of choosing is called so, in evaluation too.
_NOISE = ("jitter_noise", "input_jitter_noise")


class HealConfig(BaseModel):
    """How a compressed model is held against its parent.

    Give at most one of `steps`, `epochs` and `tokens`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    epochs: float | None = Field(default=None, gt=0, description="passes over the text")
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens in all; without a length one pass, at most 1 M tokens for router and norms, 10 M otherwise",
    )

    loss: Divergence = Field(
        default="bucket",
        description="bucket: the teacher's likeliest tokens, all others counting as one; listed: those alone, "
        "renormalised; full: the whole vocabulary, by a teacher in memory",
    )
    top_k: int = Field(default=64, ge=1, description="likeliest tokens of the teacher, for bucket and listed")
    temperature: float = Field(
        default=1.0, gt=0, description="softens both distributions; the loss is scaled by its square"
    )
    kl_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="of the divergence from the teacher")
    lm: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="of the cross-entropy of the text itself")

    lr: float | None = Field(
        default=None,
        gt=0,
        description=f"peak learning rate; by default {', '.join(f'{rate:g} ({what})' for what, rate in RATES.items())}",
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="after the warm-up")
    warmup: float = Field(default=0.03, ge=0, description="steps, or below 1 the share of them, until the peak")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's, on matrices; not for routers alone")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 for none")
    lora: LoraSettings | None = Field(default=None, description="the adapters, where these train")

    seq_len: int = Field(default=512, ge=2, description="tokens of a row; the model's limit if that is less")
    batch: int = Field(default=4, ge=1, description="rows of a micro-batch")
    accumulation: int = Field(default=1, ge=1, description="micro-batches of an optimizer step")
    pad: bool = Field(default=False, description="start each document in a row of its own")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of matrix products (weights that train are fp32); auto: bf16 where the device has it",
    )
    activation_checkpointing: bool = Field(default=False, description="less memory for a second forward")
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; 10 for router and norms, 50 for lora, else 100"
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> HealConfig:
        if self.kl_weight == 0 and self.lm == 0:
            raise ValueError("kl_weight and lm are both 0: there is nothing to learn")
        if sum(value is not None for value in (self.steps, self.epochs, self.tokens)) > 1:
            raise ValueError("steps, epochs and tokens contradict each other: give one of them")
        return self

    def objectives(self) -> dict[str, Any]:
        """The loss, as a run of training is told it."""
        knobs: dict[str, Any] = {"weight": self.kl_weight, "temperature": self.temperature}
        if self.loss != "full":
            knobs |= {"top_k": self.top_k, "rest": "bucket" if self.loss == "bucket" else "ignored"}
        return {"ce": self.lm, "kd": knobs}

    def train_config(self, what: What, *, seed: int, bos: Bos = "auto", rows: int | None = None) -> TrainConfig:
        """The run of training that this is.

        Args:
            what: trains.
            seed: of the order of rows and of adapters.
            bos: what stands before each text.
            rows: of the text, where it is known: without a length, the run goes over them once at most.
        """
        shared = set(HealConfig.model_fields) & set(TrainConfig.model_fields) - {"lr", "lora", "save_every"}
        given = {name: getattr(self, name) for name in shared}
        config = TrainConfig(
            **given,
            lr=self.lr or RATES[what],
            objectives=self.objectives(),
            parts=("all",) if what in ("all", "lora") else (what,),
            lora=(self.lora or ADAPTERS) if what == "lora" else None,
            save_every=self.save_every or SAVED_EVERY[what],
            bos=bos,
            seed=seed,
        )
        if rows is None or (self.steps, self.epochs, self.tokens) != (None, None, None):
            return config
        a_step = self.batch * self.accumulation * self.seq_len
        most = max(math.ceil(MOST_TOKENS[what] / a_step), 1)
        return config.model_copy(update={"steps": min(config.planned_steps(rows), most)})


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Let no block add noise to what it reads for as long as the `with` lasts: what a teacher says is exact."""
    kept = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in _NOISE
        if isinstance(getattr(module, name, None), float)
    ]
    for module, name, _ in kept:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def load_unfinished(model: PreTrainedModel, config: TrainConfig, checkpoint: Path) -> None:
    """Put into a model what a run had learnt when it wrote a checkpoint; adapters are merged.

    Args:
        model: as it was when the run began, or broken off by that run.
        config: of the run.
        checkpoint: one of its folders.

    Raises:
        BadCheckpoint: the checkpoint is of another run.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    if config.lora is None:
        train_only(model, config.parts)
        load_changing(model, checkpoint)
    else:
        wrapped = add_lora(model, config.lora)
        train_only(wrapped, ("adapters",))
        load_changing(wrapped, checkpoint)
        merge_lora(wrapped)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
