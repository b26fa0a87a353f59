"""`moekit heal`: what a compressed model got back, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal
from moekit.cli.views._costs import parts_of, ratio_of


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what learnt, what it cost, and the proof."""
    losses, changed = results["losses"], results["changed"]
    terminal.say(
        f"{results['what']} against {results['teacher']}: {results['steps']} steps, {results['tokens']:,} tokens, "
        f"{results['seconds']:.1f} s; loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
    terminal.say(f"changed {changed['tensors']} of {changed['of']} tensors, {changed['bytes']:,} bytes")
    if results["self_divergence"] is not None:
        terminal.say(f"the teacher against itself: {results['self_divergence']:.2g} nats a token")
    if results["resumed_from"] is not None:
        terminal.say(f"continued from step {results['resumed_from']}")
    for note in results["notes"]:
        terminal.say(note)
    if results.get("proof"):
        _show_proof(terminal, results["proof"])


def _show_proof(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    title = f"held-out text ({proof['documents']} documents, {proof['tokens']:,} tokens)"
    columns = ("model", "nats a token", "perplexity", "KL to the parent", "same top choice")
    keys = ("name", "nll", "perplexity", "divergence", "agreement")
    terminal.table(title, columns, [[model[key] for key in keys] for model in proof["models"]])
    rows: list[tuple[Any, ...]] = []
    for text in filter(None, (proof["lost"], proof["gained"], proof["left"], proof["control"])):
        for part in parts_of(text):
            told = (part["difference"] or {}).get("p_value")
            rows.append((f"{text['b']} / {text['a']}", part["domain"], *ratio_of(part["difference"]), told))
    terminal.table("perplexity, paired by document, 95 % intervals", ("of", "on", "ratio", "low", "high", "p"), rows)
    _show_closer(terminal, proof["closer"])
    if proof["recovered"] is not None:
        terminal.say(f"{proof['recovered']:.1%} of what compression lost in likelihood came back")


def _show_closer(terminal: Terminal, closer: Mapping[str, Any]) -> None:
    names = {"divergence": "KL to the parent, nats a token", "agreement": "same top choice, share of tokens"}
    rows = [
        (name, told["mean"], told["low"], told["high"], told["p_value"])
        for key, name in names.items()
        if (told := closer[key]) is not None
    ]
    if rows:
        terminal.table(
            "healed - compressed, paired by document, 95 % intervals", ("of", "mean", "low", "high", "p"), rows
        )
