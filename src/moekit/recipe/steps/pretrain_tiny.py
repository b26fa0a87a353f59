"""`use: pretrain-tiny`: train a small MoE from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from moekit._device import DEVICE_HELP
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import read_text, text_item
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    from moekit.training import TinyConfig

# fp32 weights with gradients and two moments, and once more the weights on disk.
_BYTES_PER_PARAMETER = 16


class PretrainTinyStep(Step):
    """Train a tiny model with a vocabulary of its own; a killed run resumes exactly."""

    use: Literal["pretrain-tiny"] = "pretrain-tiny"
    text: TextRef = Field(description="text of several domains: folder, source, mix or hub id")
    device: str = Field(default="auto", description=DEVICE_HELP)
    settings: dict[str, Any] = Field(default_factory=dict, description="layout, experts, training, ...: TinyConfig")

    def check(self) -> None:
        """Refuse impossible settings."""
        self.config(0)

    def config(self, seed: int) -> TinyConfig:
        """Size and training of the model.

        Raises:
            BadConfig: an unknown or impossible setting.
        """
        from moekit._validation import faults
        from moekit.training import TinyConfig

        try:
            config = TinyConfig(**self.settings)
            if "seed" in self.settings.get("training", {}):
                return config
            training = config.training.model_copy(update={"seed": seed})
            return config.model_copy(update={"training": training})
        except ValidationError as error:
            raise BadConfig(f"tiny model: {faults(error)}", hint="see moekit.training.TinyConfig") from error

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """From the model's sizes alone."""
        config = self.config(0)
        experts = config.layers * config.experts * 3 * config.hidden * config.width
        attention = config.layers * 4 * config.hidden * config.hidden
        parameters = experts + attention + config.vocabulary * config.hidden
        text = text_item(self.text, sizes)
        memory = parameters * _BYTES_PER_PARAMETER + (text.nbytes or 0)
        return Forecast(
            (text,), (Item(str(out), 4 * parameters),), disk=parameters * _BYTES_PER_PARAMETER, memory=memory
        )

    def run(self, work: JobContext) -> dict[str, Any]:
        """Train and save."""
        from moekit.training import train_tiny

        result = train_tiny(
            self.config(work.seed),
            read_text(self.text, seed=work.seed, progress=work.progress),
            work.out,
            work.progress,
            scratch=work.scratch,
            device=self.device,
            overwrite=work.overwrite,
            command=work.command,
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
