"""`moekit profile`: record what the routers choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print figures of each layer's routing."""
    terminal.say(f"{results['tokens']:,} tokens of {', '.join(results['domains'])}")
    columns = ("layer", "experts", "load cv", "max/mean", "never", "partners", "top share", "NMI", "by chance", "p")
    if results["summary"] is not None:
        rows = [_row(layer) for layer in results["summary"]["layers"]]
        terminal.table("load, effective partners, and how well domains are told apart", columns, rows)
    figures = results["figures"]
    if names := list(next(iter(figures.values()), {})):
        lines = [(int(layer), *(named[name] for name in names)) for layer, named in figures.items()]
        terminal.table("means over tokens, or largest values", ("layer", *names), lines)


def _row(layer: Mapping[str, Any]) -> tuple[Any, ...]:
    load, company, domains = layer["load"], layer["collaboration"] or {}, layer["domains"] or {}
    return (
        layer["layer"],
        f"{layer['top_k']}/{layer['experts']}",
        load["cv"],
        load["max_over_mean"],
        load["never_routed"],
        company.get("effective_partners"),
        company.get("top_partner_share"),
        domains.get("normalised"),
        domains.get("shuffled"),
        domains.get("p_value"),
    )
