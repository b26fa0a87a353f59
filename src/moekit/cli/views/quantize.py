"""`moekit quantize`: round the weights of experts to few bits, and prove what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal
from moekit.cli.views._costs import at_layer, print_method, print_proof, show_against, show_perplexity


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was rounded, what it would take packed, and what it costs."""
    print_method(terminal, results)
    _show_bytes(terminal, results)
    proof = results.get("proof")
    if proof is not None:
        show_perplexity(terminal, proof)
        show_against(
            terminal, proof, "with the same bits in the mean" if results["mean_bits"] else "with the same bits"
        )
    _show_layers(terminal, results, proof)
    print_proof(terminal, results)


def _show_bytes(terminal: Terminal, results: Mapping[str, Any]) -> None:
    told, whole = results["weights"], results["bytes"]
    bits, shared = ", ".join(f"{part} {n}" for part, n in results["bits"].items()), results["mean_bits"]
    if shared is not None:
        knobs = ", ".join(f"{k}={v}" for k, v in shared["share"].items() if k != "use" and v is not None)
        how = f"shared by {shared['share']['use']}" + (f" ({knobs})" if knobs else "")
        widths = ", ".join(map(str, shared["choices"]))
        each = "an expert" if shared["unit"] == "expert" else "a layer"
        bits = f"{shared['given']:.4g} in the mean, at most {shared['asked']:g}"
        terminal.say(f"bits {how}, {each} has one of {widths}")
    done = "are to be rounded" if results.get("check") is None else "rounded"
    terminal.say(
        f"{told['rounded']:,} weights of routed experts {done} (bits: {bits}; {told['bits']:.4f} with scales and zeros)"
    )
    terminal.say(
        f"stored in the source's dtype: the folder is as large as before, {whole['folder']:,} bytes of tensors; with "
        f"these weights packed it would take {whole['packed']:,}"
    )


def _show_layers(terminal: Terminal, results: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
    costs = [] if proof is None else [proof["method"], *proof["baselines"]]
    parts = list(results["layers"][0]["bits"]) if results["layers"] else []
    shared = results["mean_bits"] is not None
    named = ["bits", "experts of so many bits"] if shared else [f"bits: {part}" for part in parts]
    columns = ["layer", "experts", *named, "never routed"]
    columns += [f"error: {cost['name']}" for cost in costs]
    rows = []
    for layer in results["layers"]:
        bits = [layer["bits"][part] for part in parts]
        if shared:
            bits = [bits[0], ", ".join(f"{n}: {count}" for n, count in layer["widths"].items())]
        row = [layer["layer"], layer["experts"], *bits, len(layer["never_routed"])]
        rows.append(row + [at_layer(cost["reconstruction"], layer["layer"]) for cost in costs])
    terminal.table("layer by layer", columns, rows)
    if costs:
        terminal.say("error: of the block's output, relative to its norm")
