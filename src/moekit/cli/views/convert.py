"""`moekit convert`: turn a dense model into a MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print the sizes of the MoE."""
    columns = ("layers", "experts", "top_k", "width", "shared_width", "parameters", "dense_parameters")
    terminal.table(f"a MoE by {results['method']}", columns, [[results[name] for name in columns]])
