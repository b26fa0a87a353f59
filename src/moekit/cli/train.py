"""`moekit train`: train or fine-tune, with balance losses from the real selection and exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, create_model

from moekit.cli._command import build_command
from moekit.cli._options import fields_of, option_parameters, read_options
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


def _objective_options() -> type[BaseModel]:
    """One option for each objective of the catalogue, our own and those of installed packages."""
    from moekit import catalogue
    from moekit.training import TrainConfig

    fields: dict[str, Any] = {}
    for record in catalogue.methods("objective"):
        # A name that a setting of the run has already is given under --objectives.
        if (name := record.name.replace("-", "_")) not in TrainConfig.model_fields:
            settings = ", ".join(name for name in fields_of(record.cls) if name != "weight")
            help = f"{record.summary} Weight, or {{weight: ..., {settings.replace(', ', ': ..., ')}: ...}}"
            fields[name] = (float | dict[str, Any] | None, Field(default=None, description=help, alias=record.name))
    return create_model("Objectives", **fields)


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.train import TrainStep
    from moekit.training import TrainConfig

    own = step_parameters(TrainStep, ("model",), "folder of the trained checkpoint")
    knobs = option_parameters(TrainConfig, without=("seed",), panel="Training")
    objectives = _objective_options()
    terms = option_parameters(objectives, taken={p.name for p in (*own, *knobs)}, panel="Objectives")
    names = {parameter.name for parameter in knobs}

    def train(terminal: Terminal, **values: Any) -> None:
        out: Path = values.pop("out")
        overwrite: bool = values.pop("overwrite")
        named = read_options(objectives, {p.name: values.pop(p.name) for p in terms})
        settings = read_options(TrainConfig, {key: values.pop(key) for key in names})
        if named:
            by_name = {objectives.model_fields[field].alias or field: value for field, value in named.items()}
            settings["objectives"] = {**settings.get("objectives", {}), **by_name}
        carry_out(terminal, TrainStep, {**read_options(TrainStep, values), "settings": settings}, out, overwrite, _show)

    return build_command(
        train,
        help="Train or fine-tune a model on text. A killed run goes on where it was, when called again alike.",
        examples=[
            "moekit train ./moe ./tuned --text demo --split train --tokens 100000 --lr 2e-4 --balance 0.01",
            "moekit train ./moe ./tuned --text ./text --plan ./plan --steps 50 --parts router,experts",
        ],
        extra=[*own, *knobs, *terms],
    )
