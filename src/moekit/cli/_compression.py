"""What commands that make a model smaller share: options, where they write, and tables of what it costs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekit.cli._options import keyword_parameter, read_options
from moekit.cli._steps import OVERWRITE, Show, carry_out
from moekit.cli._terminal import Terminal
from moekit.errors import BadConfig

if TYPE_CHECKING:
    from moekit.recipe.steps.base import Step


def out_parameters() -> list[inspect.Parameter]:
    """`-o OUT` and `--overwrite`."""
    out = typer.Option("--out", "-o", help="Folder of the smaller model.", show_default=False)
    return [keyword_parameter("out", Path | None, out, None), keyword_parameter("overwrite", bool, OVERWRITE, False)]


def knobs_parameter() -> inspect.Parameter:
    """`--set KNOB=VALUE`."""
    knobs = typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method; may be repeated.")
    return keyword_parameter("knobs", list[str] | None, knobs, None)


def settings_of(knobs: list[str] | None) -> dict[str, Any]:
    """The step's `settings`, as far as any knobs were set."""
    from moekit.recipe.variables import parse_overrides

    return {"settings": parse_overrides(knobs)} if knobs else {}


def write_model_or_plan(terminal: Terminal, step: type[Step], values: dict[str, Any], show: Show) -> None:
    """Run a step that writes a model to OUT, a plan to `--plan FILE`, or both.

    Raises:
        BadConfig: neither was said, or FILE is no place for a plan.
    """
    out, overwrite, knobs = values.pop("out"), values.pop("overwrite"), values.pop("knobs")
    given = {**read_options(step, values), **settings_of(knobs)}
    plan = given.get("plan")
    if plan is None and out is None:
        raise BadConfig("nothing says what to write", hint="-o OUT for a model, --plan FILE for a plan, or both")
    if plan is not None:
        _check_plan_file(Path(plan))
    if out is None:
        given["write"], out = "plan", Path(given.pop("plan"))
    carry_out(terminal, step, given, out, overwrite, show)


def _check_plan_file(file: Path) -> None:
    if file.suffix != ".json":
        raise BadConfig(f"a plan is a .json file, not {file.name!r}", hint=f"--plan {file.name}.json")


def say_method(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """The method and its knobs."""
    settings = ", ".join(f"{key}={value}" for key, value in results["settings"].items() if value is not None)
    terminal.say(f"{results['method']} ({settings})" if settings else results["method"])


def say_proven(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """What the check of the output proved."""
    for line in results.get("check", {}).get("proven", ()):
        terminal.say(f"proven: {line}")


def show_perplexity(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    """Perplexity on held-out text of the model as it was, as the method leaves it, and as baselines leave it."""
    costs = [proof["method"], *proof["baselines"]]
    rows: list[tuple[Any, ...]] = []
    for parts in zip(*(parts_of(cost["text"]) for cost in costs), strict=True):
        rows.append((parts[0]["domain"], "unchanged", parts[0]["a"]["perplexity"], None, None, None))
        for cost, part in zip(costs, parts, strict=True):
            rows.append((part["domain"], cost["name"], part["b"]["perplexity"], *ratio_of(part["difference"])))
    title = f"held-out text ({proof['documents']} documents, {proof['tokens']:,} tokens), 95 % intervals"
    terminal.table(title, ("on", "model", "perplexity", "x unchanged", "low", "high"), rows)


def parts_of(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All text, then each domain where there are several."""
    domains = text["domains"] if len(text["domains"]) > 1 else ()
    return [text["overall"], *domains]


def ratio_of(difference: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    """Ratio of two perplexities and its interval; empty where there is none."""
    if difference is None:
        return (None, None, None)
    return (difference["ratio"], difference["ratio_low"], difference["ratio_high"])


def at_layer(values: Mapping[Any, float], layer: int) -> float:
    """A layer's value; JSON makes its number text."""
    return values[layer] if layer in values else values[str(layer)]
