"""`moekit apply`: carry a pruning plan out."""

from __future__ import annotations

from typing import Any

from moekit.cli._command import build_command
from moekit.cli._options import read_options
from moekit.cli._steps import carry_out
from moekit.cli._terminal import Terminal
from moekit.cli.prune import show, step_options
from moekit.errors import BadConfig


def _call(terminal: Terminal, **values: Any) -> None:
    from moekit.recipe.steps.apply import ApplyStep

    out, overwrite = values.pop("out"), values.pop("overwrite")
    if out is None:
        raise BadConfig("nothing says where to write", hint="-o OUT, the folder of the smaller model")
    carry_out(terminal, ApplyStep, read_options(ApplyStep, values), out, overwrite, show)


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.apply import ApplyStep

    return build_command(
        _call,
        name="apply",
        help="Write the model that a pruning plan describes. With --keep, decide anew from the plan's scores: no new "
        "pass over the text.",
        extra=step_options(ApplyStep, ("plan",)),
        examples=["moekit apply ./p.json -o ./half", "moekit apply ./p.json --keep 0.75 -o ./three-quarters"],
    )
