"""`moekit train`: train or fine-tune, with balance losses from the real selection and exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print steps, speed and losses."""
    losses = results["losses"]
    terminal.say(
        f"{results['steps']} steps, {results['tokens']:,} tokens, {results['tokens_per_second']:,.0f} tokens a second; "
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
    if results["heldout_losses"]:
        last = max(results["heldout_losses"], key=int)
        terminal.say(f"held-out loss {results['heldout_losses'][last]:.4f} after step {last}")
    if results["resumed_from"] is not None:
        terminal.say(f"continued from step {results['resumed_from']}")
    for note in results["notes"]:
        terminal.say(note)
