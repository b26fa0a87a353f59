"""`use: pretrain-tiny`: train a small MoE from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moekit._validation import faults
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.pretrain_tiny import PretrainTinyOptions
from moekit.jobs.shared.inputs import read_text, text_item
from moekit.progress import ProgressLike
from moekit.training import TinyConfig, train_tiny

# fp32 weights with gradients and two moments, and once more the weights on disk.
_BYTES_PER_PARAMETER = 16


class PretrainTinyResult(JobResult):
    """A small MoE trained from scratch.

    Attributes:
        parameters: of the model.
        figures: loss, balance and others.
        steps: optimizer steps.
        tokens: trained on.
        seconds: spent in steps.
        tokens_per_second: over the run.
        losses: of each step.
        resumed_from: step that this process continued from.
    """

    parameters: int
    figures: dict[str, Any]
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    losses: list[float]
    resumed_from: int | None


def pretrain_tiny(
    data: TextLike,
    *,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> PretrainTinyResult:
    """Train a tiny model with a vocabulary of its own; a killed run resumes exactly.

    Args:
        data: text of several domains: folder, source, mix or hub id.
        device: cpu, cuda, ..., or auto: a GPU if there is one.
        settings: layout, experts, training, ...: TinyConfig.
        out: folder of the model.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        Sizes, losses and speed.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(PretrainTinyOptions, PretrainTinyResult, dict(locals()))


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


def estimate(options: PretrainTinyOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """From the model's sizes alone."""
    config = config_of(options, 0)
    experts = config.layers * config.experts * 3 * config.hidden * config.width
    attention = config.layers * 4 * config.hidden * config.hidden
    parameters = experts + attention + config.vocabulary * config.hidden
    text = text_item(options.data, sizes)
    memory = parameters * _BYTES_PER_PARAMETER + (text.nbytes or 0)
    return JobEstimate(
        (text,), (Item(str(out), 4 * parameters),), disk=parameters * _BYTES_PER_PARAMETER, memory=memory
    )


def run(options: PretrainTinyOptions, context: JobContext) -> dict[str, Any]:
    """Train and save."""
    result = train_tiny(
        config_of(options, context.seed),
        read_text(options.data, seed=context.seed, progress=context.progress),
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
