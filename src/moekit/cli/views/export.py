"""`moekit export`: write a model in a packed form that engines read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal
from moekit.cli.views._costs import print_proof


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was packed, and what it takes."""
    told = ", ".join(f"{count:,} of {kind}" for kind, count in results["matrices"].items())
    what = "stacks of experts' matrices" if results["to"] == "gguf" else "matrices of experts"
    terminal.say(f"{what}: {told}")
    group = results["group"]
    if group is not None:
        shared = f"{group} inputs" if group else "the inputs of a row"
        terminal.say(f"{shared} share a scale; every matrix gave back its weights before it was written, bit for bit")
    size = results["bytes"]
    terminal.say(
        f"tensors take {size['after']:,} bytes, {size['experts']:,} of them experts; {size['before']:,} before"
    )
    if results.get("tokenizer"):
        terminal.say(f"tokenizer: {results['tokenizer']}")
    if results.get("check") is not None:
        print_proof(terminal, results)
