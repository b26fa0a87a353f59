"""`moekit sparsify`: zero single weights of the experts, and prove what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from moekit.cli._command import build_command
from moekit.cli._compression import (
    at_layer,
    knobs_parameter,
    out_parameters,
    parts_of,
    ratio_of,
    say_method,
    say_proven,
    show_perplexity,
    write_model_or_plan,
)
from moekit.cli._options import keyword_parameter, option_parameters
from moekit.cli._terminal import Terminal

# Fields that the command line gives in another way.
_ELSEWHERE = ("id", "use", "seed", "settings", "write", "model", "from_plan")


def _call(terminal: Terminal, **values: Any) -> None:
    from moekit.recipe.steps.sparsify import SparsifyStep

    write_model_or_plan(terminal, SparsifyStep, values, show)


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print the zeros counted and what they cost."""
    say_method(terminal, results)
    _show_weights(terminal, results)
    proof = results.get("proof")
    if proof is not None:
        _show_text(terminal, proof)
    _show_layers(terminal, results, proof)
    say_proven(terminal, results)


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


def _show_text(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    show_perplexity(terminal, proof)
    for text in proof["against"]:
        against = [
            (part["domain"], *ratio_of(part["difference"]), (part["difference"] or {}).get("p_value"))
            for part in parts_of(text)
        ]
        title = f"{proof['method']['name']} against {text['a']} at the same sparsity"
        terminal.table(title, ("on", "x its perplexity", "low", "high", "p"), against)


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


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.sparsify import SparsifyStep

    model = typer.Argument(help="MoE: folder or hub id; a stored plan (--from) names its own.", show_default=False)
    stored = typer.Option("--from", metavar="PLAN", help="Carry this plan out again: the same zeros without a text.")
    return build_command(
        _call,
        name="sparsify",
        help="Zero single weights of the experts: decide on text, prove what it costs on held-out text, against "
        "magnitudes at the same sparsity, write, and check what was written. Methods: moekit methods sparsify.",
        extra=[
            keyword_parameter("model", str | None, model, None),
            *out_parameters(),
            *option_parameters(SparsifyStep, without=_ELSEWHERE, panel=None),
            keyword_parameter("from_plan", str | None, stored, None),
            knobs_parameter(),
        ],
        examples=[
            "moekit sparsify ./moe --method wanda --sparsity 0.5 --data demo -o ./sparse",
            "moekit sparsify ./moe --method wanda --set pattern=2:4 --data my-domain/ -o ./two-of-four",
            "moekit sparsify ./pruned --method owl --total 0.65 --data demo --plan ./p.json -o ./sparse",
            "moekit sparsify --from ./p.json -o ./again",
        ],
    )
