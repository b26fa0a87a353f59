"""`moekit run`: carry out a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._options import out_option
from moekit.cli._terminal import Terminal, size
from moekit.errors import BadConfig

if TYPE_CHECKING:
    from moekit.recipe.runner import Event, Marker
    from moekit.recipe.schema import Recipe


def run(
    terminal: Terminal,
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML file, or the name of a recipe of moekit", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="variables of the recipe")
    ] = None,
    out: Annotated[str | None, out_option("run folder, instead of the recipe's")] = None,
    until: Annotated[str | None, typer.Option(help="stop after this step")] = None,
    again: Annotated[
        list[str] | None, typer.Option(help="run this step even if it is finished; may be repeated")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="name the recipes that come with moekit, and stop")] = False,
) -> None:
    """Carry out a recipe, step by step. Steps that are finished are skipped; a killed run goes on where it was."""
    from moekit.recipe.runner import run as run_recipe
    from moekit.recipe.schema import load_recipe
    from moekit.recipe.variables import parse_overrides

    if listed:
        _list(terminal)
        return
    if recipe is None:
        raise BadConfig("no recipe is given", hint="`moekit run --list` names those that come with moekit")
    seed = terminal.seed if terminal.seed_given else None
    loaded = load_recipe(recipe, parse_overrides(overrides or []), out=out, seed=seed)
    chosen = _Chosen(until, frozenset(again or ()))
    if terminal.dry_run:
        _print_estimate(terminal, loaded, chosen)
        return
    _say_how_long(terminal, loaded, chosen)
    total = len(loaded.steps)
    position = {step.id: number for number, step in enumerate(loaded.steps, 1)}

    def tell(event: Event, name: str, marker: Marker | None) -> None:
        head = f"[{position[name]}/{total}] {name}"
        if event == "started":
            terminal.note(f"{head} ...")
        elif marker is not None:
            terminal.note(f"{head} {'was done' if event == 'skipped' else 'done'} in {marker.seconds:.0f} s")

    result = run_recipe(loaded, until=chosen.until, again=chosen.again, progress=terminal.progress, tell=tell)
    steps = {name: {"seconds": marker.seconds, "results": marker.results} for name, marker in result.done.items()}
    terminal.answer(out=str(result.folder), ran=result.ran, steps=steps)
    for marker in result.done.values():
        if marker.use == "report":
            for line in marker.results.get("findings", ()):
                terminal.say(line)
            terminal.say(f"report: {marker.results.get('page')}")


def _list(terminal: Terminal) -> None:
    from moekit.recipe.packaged import packaged_recipes, recipes_folder

    found = packaged_recipes()
    terminal.answer(recipes=found, folder=str(recipes_folder()))
    terminal.table("", ("recipe", "what it does"), list(found.items()))
    terminal.say(f"\nThey lie in {recipes_folder()}: copy one to change it.")


@dataclass(frozen=True)
class _Chosen:
    """Which steps are to run: up to one of them, and some even if they are finished."""

    until: str | None
    again: frozenset[str]


def _print_estimate(terminal: Terminal, recipe: Recipe, chosen: _Chosen) -> None:
    from moekit.jobs.estimates import merged
    from moekit.recipe.duration import in_words
    from moekit.recipe.forecast import durations, estimate, left

    estimates = estimate(recipe, until=chosen.until)
    to_do = left(recipe, until=chosen.until, again=chosen.again)
    seconds = durations(recipe, until=chosen.until)
    inside = f"{recipe.folder}/"

    def time_of(name: str) -> str:
        if name not in to_do:
            return "finished"
        return "?" if (took := seconds[name]) is None else in_words(took)

    rows = [
        (
            name,
            _short([item.what.removeprefix(inside) for item in part.reads]),
            size(part.disk),
            size(part.memory),
            time_of(name),
        )
        for name, part in estimates.items()
    ]
    columns = ("step", "reads", "disk", "memory", "time")
    terminal.table(f"{recipe.name}: {len(rows)} steps into {recipe.out}", columns, rows)
    remaining = {name: seconds[name] for name in to_do}
    if to_do:
        terminal.estimate(merged({name: estimates[name] for name in to_do}))
        terminal.say(f"time    {_how_long(remaining)}")
    else:
        terminal.say("all of them are finished: nothing would be done")
    told = {
        name: {**part.as_dict(), "seconds": seconds[name], "finished": name not in to_do}
        for name, part in estimates.items()
    }
    terminal.answer(dry_run=True, steps=told, seconds=sum(took or 0 for took in remaining.values()))


def _say_how_long(terminal: Terminal, recipe: Recipe, chosen: _Chosen) -> None:
    from moekit.recipe.forecast import durations, left

    if to_do := left(recipe, until=chosen.until, again=chosen.again):
        seconds = durations(recipe, until=chosen.until)
        terminal.note(f"{len(to_do)} steps: {_how_long({name: seconds[name] for name in to_do})}")


def _how_long(seconds: Mapping[str, float | None]) -> str:
    """All of it in words; what nothing is known of is said to be missing."""
    from moekit.recipe.duration import in_words

    unknown = sum(took is None for took in seconds.values())
    told = f"about {in_words(sum(took or 0 for took in seconds.values()))} on this machine, downloads not counted"
    told += " (estimated from a second of matrix products)"
    return told + (f"; of {unknown} steps nothing is known beforehand" if unknown else "")


def _short(names: list[str], limit: int = 3) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(distinct[:limit]) + more


def build() -> Any:
    """The command."""
    examples = [
        "moekit run --list",
        "moekit run c2r-demo",
        "moekit run c2r model=allenai/OLMoE-1B-7B-0924 data=wikitext --dry-run",
    ]
    return build_command(run, examples=examples)
