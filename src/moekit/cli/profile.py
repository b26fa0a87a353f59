"""`moekit profile`: record what the routers choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._steps import build_step_command
from moekit.cli._terminal import Terminal


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    terminal.say(f"{results['tokens']:,} tokens of {', '.join(results['domains'])}")


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.profile import ProfileStep

    return build_step_command(
        ProfileStep,
        name="profile",
        help="Record which experts each token of a text chooses: a trace on disk, and statistics of it.",
        arguments=("model",),
        writes="folder of the trace",
        examples=["moekit profile allenai/OLMoE-1B-7B-0924 ./trace --text wikitext --max-tokens 100000"],
        show=_show,
    )
