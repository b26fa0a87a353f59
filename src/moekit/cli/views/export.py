"""`moekit export`: write a model in a packed form that engines read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal
from moekit.cli.views._costs import print_proof


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was packed, and what it takes."""
    told = ", ".join(f"{count:,} of {bits} bits" for bits, count in results["matrices"].items())
    group = f"groups of {results['group']}" if results["group"] else "a scale a row"
    terminal.say(
        f"matrices of experts in {results['layers']} layers: {told}, {group}; each gives back its weights bit for bit"
    )
    size = results["bytes"]
    terminal.say(
        f"tensors take {size['after']:,} bytes, {size['experts']:,} of them experts; {size['before']:,} before"
    )
    if results.get("check") is not None:
        print_proof(terminal, results)
