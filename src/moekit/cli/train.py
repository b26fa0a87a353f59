"""`moekit train`: train or fine-tune, with balance losses from the real selection and exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.cli._command import build_command
from moekit.cli._options import option_parameters, read_options
from moekit.cli._steps import carry_out, step_parameters
from moekit.cli._terminal import Terminal


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    losses = results["losses"]
    terminal.say(
        f"{results['steps']} steps, {results['tokens']:,} tokens, {results['tokens_per_second']:,.0f} tokens a second; "
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
    if results["heldout_losses"]:
        last = max(results["heldout_losses"], key=int)
        terminal.say(f"held-out loss {results['heldout_losses'][last]:.4f} after step {last}")
    if results["resumed_from"] is not None:
        terminal.say(f"continued from step {results['resumed_from']}")


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.train import TrainStep
    from moekit.training import TrainConfig

    own = step_parameters(TrainStep, ("model",), "folder of the trained checkpoint")
    knobs = option_parameters(TrainConfig, without=("seed",), panel="Training")
    names = {parameter.name for parameter in knobs}

    def train(terminal: Terminal, **values: Any) -> None:
        out: Path = values.pop("out")
        overwrite: bool = values.pop("overwrite")
        settings = read_options(TrainConfig, {key: values.pop(key) for key in names})
        carry_out(terminal, TrainStep, {**read_options(TrainStep, values), "settings": settings}, out, overwrite, _show)

    return build_command(
        train,
        help="Train or fine-tune a model on text. A killed run goes on where it was, when called again alike.",
        examples=[
            "moekit train ./moe ./tuned --text demo --split train --tokens 100000 --lr 2e-4 --balance-coef 0.01",
            "moekit train ./moe ./tuned --text ./text --plan ./plan --steps 50 --parts router,experts",
        ],
        extra=[*own, *knobs],
    )
