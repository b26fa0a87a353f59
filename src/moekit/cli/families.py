"""`moekit families`: which families of the installed transformers work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from moekit.cli._command import build_command
from moekit.cli._jobs import carry_out
from moekit.cli._terminal import Terminal

_SIGNS = {"yes": "yes", "refused": "no", "failed": "FAILED", "untried": "-"}


def families(
    terminal: Terminal,
    names: Annotated[
        list[str] | None, typer.Argument(help="model types, as config.json says them; all by default")
    ] = None,
    only: Annotated[
        Literal["works", "refused", "failed"] | None,
        typer.Option(help="show only families where all works, something is refused, or something failed"),
    ] = None,
) -> None:
    """List every Mixture-of-Experts family of the installed transformers, and try each command on a tiny model of it.

    Nothing is downloaded: models are random, made by rules over their config's fields, in a temporary folder. "no" is
    what moekit refuses, with its reason below the table; "-" needs what did not work. Leaves with 0 in any case.
    """
    from moekit.jobs.options.families import FamiliesOptions

    given: dict[str, Any] = {"names": tuple(names or ()), "only": only}
    carry_out(terminal, FamiliesOptions, given, None, False, show)


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print the table, and below it why something is not done, once for all families that it is said of."""
    steps, rows = results["steps"], results["families"]
    body = [(row["name"], *(_SIGNS[row["cells"][step]["state"]] for step in steps)) for row in rows]
    terminal.table(f"transformers {results['transformers']}", ("family", *steps), body)
    for (message, when), told in _reasons(steps, rows).items():
        of = ", ".join(f"{name} ({', '.join(tried)})" for name, tried in told.items())
        terminal.say(f"{of}, {when}: {message}")
    works = sum(row["cells"]["stock"]["state"] == "yes" for row in rows)
    terminal.say(f"{len(rows)} families, {works} of which prune to a folder that stock transformers loads")


def _reasons(steps: list[str], rows: list[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """What was said, and when -> family -> the steps that said so."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        for step in steps:
            cell = row["cells"][step]
            if cell["message"]:
                told = found.setdefault((cell["message"], cell["when"]), {})
                told.setdefault(row["name"], []).append(step)
    return found


def build() -> Any:
    """The command."""
    return build_command(families, examples=["moekit families", "moekit families mixtral llama4 --json"])
