"""Tables of what a smaller model costs, for all commands that make one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def print_method(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """The method and its knobs."""
    settings = ", ".join(f"{key}={value}" for key, value in results["settings"].items() if value is not None)
    terminal.say(f"{results['method']} ({settings})" if settings else results["method"])


def print_proof(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """What the check of the output proved."""
    for line in results.get("check", {}).get("proven", ()):
        terminal.say(f"proven: {line}")


def show_perplexity(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    """Perplexity on held-out text of the model as it was, as the method leaves it, and as baselines leave it."""
    costs = [proof["method"], *proof["baselines"]]
    rows: list[tuple[Any, ...]] = []
    for parts in zip(*(parts_of(cost["text"]) for cost in costs), strict=True):
        rows.append((parts[0]["domain"], "unchanged", parts[0]["a"]["perplexity"], None, None, None))
        for cost, part in zip(costs, parts, strict=True):
            rows.append((part["domain"], cost["name"], part["b"]["perplexity"], *ratio_of(part["difference"])))
    title = f"held-out text ({proof['documents']} documents, {proof['tokens']:,} tokens), 95 % intervals"
    terminal.table(title, ("on", "model", "perplexity", "x unchanged", "low", "high"), rows)


def show_against(terminal: Terminal, proof: Mapping[str, Any], alike: str) -> None:
    """The method's perplexity against that of each baseline.

    Args:
        terminal: where to.
        proof: of the job.
        alike: what they have in common, such as "at the same sparsity".
    """
    for text in proof["against"]:
        against = [
            (part["domain"], *ratio_of(part["difference"]), (part["difference"] or {}).get("p_value"))
            for part in parts_of(text)
        ]
        title = f"{proof['method']['name']} against {text['a']} {alike}"
        terminal.table(title, ("on", "x its perplexity", "low", "high", "p"), against)


def parts_of(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All text, then each domain where there are several."""
    domains = text["domains"] if len(text["domains"]) > 1 else ()
    return [text["overall"], *domains]


def ratio_of(difference: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    """Ratio of two perplexities and its interval; empty where there is none."""
    if difference is None:
        return (None, None, None)
    return (difference["ratio"], difference["ratio_low"], difference["ratio_high"])


def at_layer(values: Mapping[Any, float], layer: int) -> float:
    """A layer's value; JSON makes its number text."""
    return values[layer] if layer in values else values[str(layer)]
