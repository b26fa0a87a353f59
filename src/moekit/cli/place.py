"""`moekit place`: which device holds which expert, and what that sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._steps import build_step_group
from moekit.cli._terminal import Terminal


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    columns = ("placement", "rows/token", "once per expert", "spared", "leave home", "max/mean load", "gap")
    for part in results["devices"]:
        rows = [
            (
                row["name"],
                row["rows_per_token"],
                row["once_per_expert"],
                f"{row['saved']:.1%}",
                row["remote_per_token"],
                row["imbalance"],
                row["gap"],
            )
            for row in part["rows"]
        ]
        proven = f"{part['proven_layers']} of {part['layers']} layers are proven optima"
        terminal.table(f"{part['devices']} devices ({proven})", columns, rows)
        if part["gain"] is not None:
            gain = part["gain"]
            terminal.say(
                f"beyond placement alone: {gain['difference']:.4f} rows a token fewer "
                f"[{gain['low']:.4f}, {gain['high']:.4f}], over {gain['documents']} documents"
            )


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.place import PlaceStep

    return build_step_group(
        PlaceStep,
        "place",
        name="place",
        help="Decide which device holds which expert, by one of these solvers, and replay the trace to count the rows.",
        arguments=("trace",),
        writes="folder of the placements and counts",
        example=lambda record: f"moekit place {record.name} ./trace ./placement --devices 2,4,8",
        show=_show,
    )
