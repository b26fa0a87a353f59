"""`moekit expert-sets`: what each task wants of a model's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal, size
from moekit.cli.views._costs import print_method


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was recorded of each task."""
    print_method(terminal, results)
    rows = [
        (
            made["task"],
            made["documents"],
            made["tokens"],
            sum(len(experts) for experts in made["never_routed"].values()),
            size(made["bytes"]),
        )
        for made in results["made"]
    ]
    title = f"expert sets of {results['experts']} experts in {len(results['layers'])} layers"
    terminal.table(title, ("task", "documents", "tokens", "never routed", "on disk"), rows)
    terminal.say(f"tasks here: {', '.join(results['tasks'])}")
