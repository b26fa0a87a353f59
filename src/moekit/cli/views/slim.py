"""`moekit slim`: make every expert narrower, and prove what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal, size
from moekit.cli.views._costs import at_layer, print_method, print_proof, show_against, show_perplexity


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print how narrow experts became, what is saved, and what it costs."""
    print_method(terminal, results)
    _show_sizes(terminal, results)
    proof = results.get("proof")
    if proof is not None:
        show_perplexity(terminal, proof)
        show_against(terminal, proof, "at the same width")
    _show_layers(terminal, results, proof)
    print_proof(terminal, results)


def _show_sizes(terminal: Terminal, results: Mapping[str, Any]) -> None:
    width, weights, nbytes = results["width"], results["weights"], results["bytes"]
    less = 1 - nbytes["after"] / nbytes["before"]
    terminal.say(
        f"neurons of a routed expert {width['before']:,} -> {width['after']:,}, weights of routed experts "
        f"{weights['before']:,} -> {weights['after']:,}, {size(nbytes['before'])} -> {size(nbytes['after'])} "
        f"({less:.0%} less)"
    )
    named = {"groups": "groups of attention heads", "shared": "neurons of shared experts"}
    for kind, cut in results["beside"].items():
        terminal.say(f"{named[kind]} {cut['before']:,} -> {cut['after']:,}")
    if results["shared"]:
        terminal.say("shared experts stay as wide as they are")


def _show_layers(terminal: Terminal, results: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
    costs = [] if proof is None else [proof["method"], *proof["baselines"]]
    told = [name for name in ("unrepaired", "repaired") if any(name in one["figures"] for one in results["layers"])]
    columns = ["layer", "experts", "never routed", *told, *(f"error: {cost['name']}" for cost in costs)]
    rows = []
    for layer in results["layers"]:
        row = [layer["layer"], layer["experts"], len(layer["never_routed"])]
        row += [layer["figures"].get(name) for name in told]
        rows.append(row + [at_layer(cost["reconstruction"], layer["layer"]) for cost in costs])
    terminal.table("layer by layer", columns, rows)
    if told:
        terminal.say("unrepaired, repaired: error of experts' outputs on the text to decide on, relative to their norm")
    if costs:
        terminal.say("error: of the block's output on held-out text, relative to its norm")
