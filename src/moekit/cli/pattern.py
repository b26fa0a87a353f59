"""`moekit pattern`: what each task wants of a model's experts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from moekit.cli._command import build_command
from moekit.cli._compression import knobs_parameter, say_method, settings_of
from moekit.cli._options import keyword_parameter, option_parameters, read_options
from moekit.cli._steps import carry_out
from moekit.cli._terminal import Terminal, size
from moekit.errors import BadConfig

# Fields that the command line gives in another way.
_ELSEWHERE = ("id", "use", "seed", "settings", "existing")


def _call(terminal: Terminal, **values: Any) -> None:
    from moekit.recipe.steps.pattern import PatternStep
    from moekit.serving.expert_sets.store import INDEX_FILE

    out, overwrite, knobs = values.pop("out"), values.pop("overwrite"), values.pop("knobs")
    given = {**read_options(PatternStep, values), **settings_of(knobs)}
    given["existing"] = "replace" if overwrite else "add"
    if out.exists() and not (out / INDEX_FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise BadConfig("there is something else here, and no patterns", file=out, hint="choose another folder")
    # The folder stays: tasks are added to it.
    carry_out(terminal, PatternStep, given, out, True, _show)


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    say_method(terminal, results)
    rows = [
        (
            made["task"],
            made["documents"],
            made["tokens"],
            sum(len(experts) for experts in made["never_routed"].values()),
            size(made["bytes"]),
        )
        for made in results["made"]
    ]
    title = f"patterns of {results['experts']} experts in {len(results['layers'])} layers"
    terminal.table(title, ("task", "documents", "tokens", "never routed", "on disk"), rows)
    terminal.say(f"tasks here: {', '.join(results['tasks'])}")


def _parameters() -> list[inspect.Parameter]:
    from moekit.recipe.steps.pattern import PatternStep

    out = typer.Option("--out", "-o", help="Folder of patterns; tasks are added to it.", show_default=False)
    overwrite = typer.Option("--overwrite", help="Replace tasks that the folder holds already.")
    own = option_parameters(PatternStep, without=_ELSEWHERE, arguments=("model",), panel=None)
    return [
        own[0],
        keyword_parameter("out", Path, out),
        keyword_parameter("overwrite", bool, overwrite, False),
        *own[1:],
        knobs_parameter(),
    ]


def build() -> Any:
    """The command."""
    return build_command(
        _call,
        name="pattern",
        help="Record what the routers make of each task's text and keep the ranks of all experts: a few hundred "
        "kilobytes a task, which serve every budget. moekit generate --patterns then loads the experts of a prompt's "
        "task alone.",
        extra=_parameters(),
        examples=[
            "moekit pattern ./moe --task maths --data my-maths/ -o ./patterns",
            "moekit pattern ./moe --data my-domains/ --generalist -o ./patterns",
            "moekit pattern ./moe --task maths --method reap --data my-maths/ -o ./by-reap",
        ],
    )
