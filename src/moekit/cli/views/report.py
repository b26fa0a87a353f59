"""`moekit report`: one page about a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what the page says first."""
    for line in results["findings"]:
        terminal.say(line)
    terminal.say(f"page: {results['page']}")
