"""`moekit convert`: turn a dense model into a MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._steps import build_step_group
from moekit.cli._terminal import Terminal


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    columns = ("layers", "experts", "top_k", "width", "shared_width", "parameters", "dense_parameters")
    terminal.table(f"a MoE by {results['method']}", columns, [[results[name] for name in columns]])


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.convert import ConvertStep

    return build_step_group(
        ConvertStep,
        "convert",
        name="convert",
        help="Turn a dense model into a MoE, by one of these methods.",
        arguments=("model",),
        writes="folder of the new checkpoint",
        example=lambda record: f"moekit convert {record.name} ./dense ./moe --experts 32 --top-k 4 --text demo",
        show=_show,
    )
