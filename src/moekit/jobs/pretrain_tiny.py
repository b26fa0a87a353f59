"""`use: pretrain-tiny`: train a small MoE from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moekit._validation import faults
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.pretrain_tiny import PretrainTinyOptions
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import read_text, text_item
from moekit.training import TinyConfig, train_tiny

# fp32 weights with gradients and two moments, and once more the weights on disk.
_BYTES_PER_PARAMETER = 16


def check(options: PretrainTinyOptions) -> None:
    """Refuse impossible settings."""
    config_of(options, 0)


def config_of(options: PretrainTinyOptions, seed: int) -> TinyConfig:
    """Size and training of the model.

    Raises:
        BadConfig: an unknown or impossible setting.
    """
    try:
        config = TinyConfig(**options.settings)
        if "seed" in options.settings.get("training", {}):
            return config
        training = config.training.model_copy(update={"seed": seed})
        return config.model_copy(update={"training": training})
    except ValidationError as error:
        raise BadConfig(f"tiny model: {faults(error)}", hint="see moekit.training.TinyConfig") from error


def estimate(options: PretrainTinyOptions, out: Path, sizes: Sizes) -> Forecast:
    """From the model's sizes alone."""
    config = config_of(options, 0)
    experts = config.layers * config.experts * 3 * config.hidden * config.width
    attention = config.layers * 4 * config.hidden * config.hidden
    parameters = experts + attention + config.vocabulary * config.hidden
    text = text_item(options.text, sizes)
    memory = parameters * _BYTES_PER_PARAMETER + (text.nbytes or 0)
    return Forecast((text,), (Item(str(out), 4 * parameters),), disk=parameters * _BYTES_PER_PARAMETER, memory=memory)


def run(options: PretrainTinyOptions, context: JobContext) -> dict[str, Any]:
    """Train and save."""
    result = train_tiny(
        config_of(options, context.seed),
        read_text(options.text, seed=context.seed, progress=context.progress),
        context.out,
        context.progress,
        scratch=context.scratch,
        device=options.device,
        overwrite=context.overwrite,
        command=context.command,
    )
    training = result.training
    return {
        "parameters": result.parameters,
        "figures": result.figures(),
        "steps": training.steps,
        "tokens": training.tokens,
        "seconds": training.seconds,
        "tokens_per_second": training.tokens_per_second,
        "losses": training.losses,
        "resumed_from": training.resumed_from,
    }
