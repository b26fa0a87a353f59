"""`moekit route`: plan a routing policy and write a model that routes by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was planned."""
    settings = ", ".join(f"{key}={value}" for key, value in results["settings"].items() if value is not None)
    terminal.say(f"{results['method']} ({settings}) on {results['layers']} layers")
