"""`moekit route`: plan a routing policy and write a model that routes by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moekit.cli._steps import build_step_group
from moekit.cli._terminal import Terminal

if TYPE_CHECKING:
    from moekit.catalogue import MethodRecord


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    settings = ", ".join(f"{key}={value}" for key, value in results["settings"].items() if value is not None)
    terminal.say(f"{results['method']} ({settings}) on {results['layers']} layers")


def _example(record: MethodRecord) -> str:
    trace = " --trace ./trace" if record.needs else ""
    required = [name for name, field in getattr(record.cls, "model_fields", {}).items() if field.is_required()]
    options = "".join(f" --{name.replace('_', '-')} ..." for name in required)
    special = " --top-t 8" if record.name == "c2r" else ""
    return f"moekit route {record.name} ./moe ./routed{trace}{options}{special}"


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.route import RouteStep

    return build_step_group(
        RouteStep,
        "routing",
        name="route",
        help="Plan a routing policy from a trace, by one of these methods, and write the model that routes by it.",
        arguments=("model",),
        writes="folder of the plan, or with --write model of the checkpoint",
        example=_example,
        show=_show,
    )
