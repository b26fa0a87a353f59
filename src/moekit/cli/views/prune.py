"""`moekit prune`: drop the experts a model needs least, and prove what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.cli._terminal import Terminal, size
from moekit.cli.views._costs import (
    at_layer,
    parts_of,
    print_method,
    print_proof,
    ratio_of,
    show_perplexity,
)


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was decided and what it costs."""
    print_method(terminal, results)
    experts, nbytes = results["experts"], results["bytes"]
    share = 1 - nbytes["after"] / nbytes["before"]
    terminal.say(
        f"experts {experts['before']:,} -> {experts['after']:,}, "
        f"{size(nbytes['before'])} -> {size(nbytes['after'])} ({share:.0%} less)"
    )
    proof = results.get("proof")
    if proof is not None:
        _show_text(terminal, proof)
    _show_layers(terminal, results, proof)
    _show_figures(terminal, results["layers"])
    print_proof(terminal, results)


def _show_text(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    show_perplexity(terminal, proof)
    against = [
        (text["a"], part["domain"], *ratio_of(part["difference"]), (part["difference"] or {}).get("p_value"))
        for text in proof["against"]
        for part in parts_of(text)
    ]
    name = proof["method"]["name"]
    terminal.table(
        f"{name} against baselines of the same budget",
        ("baseline", "on", "x its perplexity", "low", "high", "p"),
        against,
    )
    spread = proof["random"]
    if spread is not None:
        terminal.say(
            f"random, {spread['seeds']} seeds: perplexity {spread['mean']:.4g}, standard deviation "
            f"{spread['deviation']:.3g}, from {spread['least']:.4g} to {spread['most']:.4g}"
        )


def _show_layers(terminal: Terminal, results: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
    costs = [] if proof is None else [proof["method"], *proof["baselines"]]
    columns = ["layer", "experts", "kept", "never routed"]
    if proof is not None:
        columns += ["tokens hit %", "choices lost %", *(f"error: {cost['name']}" for cost in costs)]
    rows = []
    for layer in results["layers"]:
        row = [layer["layer"], layer["experts"], len(layer["kept"]), len(layer["never_routed"])]
        if proof is not None:
            number = layer["layer"]
            row += [100 * at_layer(proof["method"][name], number) for name in ("lost_tokens", "lost_choices")]
            row += [at_layer(cost["reconstruction"], number) for cost in costs]
        rows.append(row)
    terminal.table("layer by layer", columns, rows)
    if proof is not None:
        terminal.say("hit: had chosen an expert that is gone; error: of the block's output, relative to its norm")


def _show_figures(terminal: Terminal, layers: Sequence[Mapping[str, Any]]) -> None:
    """What the method itself tells of each layer, as far as it is single numbers."""
    found = [{k: v for k, v in layer["figures"].items() if isinstance(v, int | float)} for layer in layers]
    names = list(dict.fromkeys(name for figures in found for name in figures))
    if names:
        rows = [
            (layer["layer"], *(figures.get(name) for name in names))
            for layer, figures in zip(layers, found, strict=True)
        ]
        terminal.table("what the method tells", ("layer", *(name.replace("_", " ") for name in names)), rows)
