"""`moekit fit`: what was expected of plans, what they were measured to cost, and which was taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal, size
from moekit.cli.views import heal
from moekit.cli.views._costs import print_proof, show_perplexity


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print the plan, the front, all plans tried, and each layer's recipe."""
    nbytes = results["bytes"]
    terminal.say(
        f"for {results['engine']}: {size(nbytes['before'])} -> {size(nbytes['after'])} of {size(nbytes['budget'])} "
        f"asked for (at least {size(nbytes['least'])})"
    )
    if results["packed"]:
        terminal.say(
            f"the folder holds rounded weights as wide as before, {size(nbytes['folder'])}; exported as "
            f"{results['packed']} it takes {size(nbytes['after'])}"
        )
    unit = "nats a token" if results["price"] == "fisher" else "change of the residual stream"
    _show_front(terminal, results, unit)
    _show_tried(terminal, results)
    proof = results.get("proof")
    if proof is not None:
        show_perplexity(terminal, proof | {"baselines": proof["baselines"][:3]})
    rows = [
        (told["layer"], told["experts"], told["width"], told["bits"] or "as stored", told["bytes"], told["expected"])
        for told in results["layers"]
    ]
    terminal.table(
        f"{results['name']}, layer by layer", ("layer", "experts", "width", "bits", "bytes", f"expected, {unit}"), rows
    )
    print_proof(terminal, results)
    if results.get("healed"):
        terminal.say(f"before healing: {results['healed']['unhealed']}")
        heal.show(terminal, results["healed"])


def _show_front(terminal: Terminal, results: Mapping[str, Any], unit: str) -> None:
    rows = [(size(point["bytes"]), point["expected"], point["recipes"]) for point in results["front"]]
    terminal.table("expected over budgets", ("bytes", unit, "recipes"), rows)


def _show_tried(terminal: Terminal, results: Mapping[str, Any]) -> None:
    rows = [
        (told["name"], size(told["bytes"]), told["expected"], told["chosen_on"], told["measured"], told["recipes"])
        for told in results["tried"]
    ]
    title = "plans of these bytes, best first (KL of the unchanged model's predictions to theirs, nats a token)"
    terminal.table(title, ("plan", "bytes", "expected", "KL chosen by", "measured KL", "recipes"), rows)
    correlation = results["correlation"]
    if correlation is not None:
        terminal.say(
            f"expected and measured costs of {len(rows)} plans: rank correlation {correlation:.3f} "
            f"({_trust(correlation)})"
        )


def _trust(correlation: float) -> str:
    if correlation >= 0.9:
        return "expected costs rank plans of this model well"
    if correlation >= 0.7:
        return "expected costs are a guide: measure more plans with --tries"
    return "expected costs do not rank these plans: go by what was measured"
