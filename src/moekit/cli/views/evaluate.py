"""`moekit evaluate`: perplexity and multiple choice, with error bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print perplexities, answers, and the paired comparison."""
    if results["domains"]:
        columns = ("domain", "documents", "tokens", "perplexity", "low", "high")
        rows = [[domain[name] for name in columns] for domain in results["domains"]]
        terminal.table(f"perplexity of {results['name']} (95 % interval over documents)", columns, rows)
    answers = [
        (task["task"], task["n"], metric, value, error)
        for task in results["tasks"]
        for metric, (value, error) in task["metrics"].items()
    ]
    if answers:
        terminal.table("multiple choice", ("task", "questions", "metric", "value", "standard error"), answers)
    if "comparison" in results:
        _show_comparison(terminal, results["comparison"])


def _show_comparison(terminal: Terminal, comparison: Mapping[str, Any]) -> None:
    title = f"{comparison['b']} against {comparison['a']}: paired difference, 95 % interval"
    rows = []
    for part in filter(None, [comparison["overall"], *comparison["domains"]]):
        rows.append(
            (part["domain"], "nats a token", part["a"]["nll"], part["b"]["nll"], *_interval(part["difference"]))
        )
    for task in comparison["tasks"]:
        rows.append((task["task"], task["metric"], task["a"], task["b"], *_interval(task["difference"])))
    terminal.table(title, ("on", "measure", "a", "b", "b - a", "low", "high"), rows)


def _interval(difference: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    return (None, None, None) if difference is None else (difference["mean"], difference["low"], difference["high"])
