"""`moekit report`: one page about a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._steps import build_step_command
from moekit.cli._terminal import Terminal


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    for line in results["findings"]:
        terminal.say(line)
    terminal.say(f"page: {results['page']}")


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.report import ReportStep

    return build_step_command(
        ReportStep,
        name="report",
        help="Write one self-contained page, and the same numbers as JSON, about traces, placements and evaluations.",
        arguments=(),
        writes="folder of the page",
        examples=[
            "moekit report ./report --traces ./before/trace,./after/trace --evaluations ./after",
            "moekit report ./report --free ./placed --constrained ./placed-t8 --costs ./evaluated-t8",
        ],
        show=_show,
    )
