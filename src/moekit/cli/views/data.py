"""What `moekit data write` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Documents and bytes of each domain."""
    rows = [
        (domain, split, part["documents"], part["bytes"])
        for domain, parts in results.get("domains", {}).items()
        for split, part in parts.items()
    ]
    if rows:
        terminal.table("", ("domain", "split", "documents", "bytes"), rows)
