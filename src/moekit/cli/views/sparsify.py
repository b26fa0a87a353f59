"""`moekit sparsify`: zero single weights of the experts, and prove what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal
from moekit.cli.views._costs import at_layer, print_method, print_proof, show_against, show_perplexity


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print the zeros counted and what they cost."""
    print_method(terminal, results)
    _show_weights(terminal, results)
    proof = results.get("proof")
    if proof is not None:
        show_perplexity(terminal, proof)
        show_against(terminal, proof, "at the same sparsity")
    _show_layers(terminal, results, proof)
    print_proof(terminal, results)


def _show_weights(terminal: Terminal, results: Mapping[str, Any]) -> None:
    told = results["weights"]
    original, present, zeros = told["original"], told["present"], told["zeros"]
    if zeros is None:
        terminal.say(f"{results['sparsity']:.2%} of {present:,} weights of routed experts are to become zero")
        return
    terminal.say(f"zeros: {zeros:,} of {present:,} weights of routed experts ({told['sparsity']:.4%})")
    if original is not None and original != present:
        gone = original - present + zeros
        terminal.say(
            f"gone in all: {original - present:,} with their experts + {zeros:,} zeros = {gone:,} of {original:,} "
            f"({told['total']:.4%})"
        )


def _show_layers(terminal: Terminal, results: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
    costs = [] if proof is None else [proof["method"], *proof["baselines"]]
    columns = ["layer", "experts", "zeros asked %", "zeros %", "never routed"]
    columns += [f"error: {cost['name']}" for cost in costs]
    rows = []
    for layer in results["layers"]:
        zeros = None if layer["zeros"] is None else 100 * layer["zeros"]
        row = [layer["layer"], layer["experts"], 100 * layer["sparsity"], zeros, len(layer["never_routed"])]
        rows.append(row + [at_layer(cost["reconstruction"], layer["layer"]) for cost in costs])
    terminal.table("layer by layer", columns, rows)
    if costs:
        terminal.say("error: of the block's output, relative to its norm")
