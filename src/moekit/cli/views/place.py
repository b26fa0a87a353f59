"""`moekit place`: which device holds which expert, and what that sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal, size

# More loads than fit into a line are told by their extremes.
_MOST_LOADS = 16


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print the rows counted, and bytes and seconds where links are known."""
    columns = ("placement", "rows/token", "once per expert", "spared", "leave home", "max/mean load", "gap")
    for part in results["devices"]:
        rows = [
            (
                row["name"],
                row["rows_per_token"],
                row["once_per_expert"],
                f"{row['saved']:.1%}",
                row["remote_per_token"],
                row["imbalance"],
                row["gap"],
            )
            for row in part["rows"]
        ]
        proven = f"{part['proven_layers']} of {part['layers']} layers are proven optima"
        terminal.table(f"{part['devices']} devices ({proven})", columns, rows)
        if part["redundant"]:
            slots = f"{part['redundant']} expert slot{'s' if part['redundant'] > 1 else ''} more"
            terminal.say(f"+{part['redundant']}: every device has {slots}, for copies of hot experts")
        if part["gain"] is not None:
            gain = part["gain"]
            terminal.say(
                f"beyond placement alone: {gain['difference']:.4f} rows a token fewer "
                f"[{gain['low']:.4f}, {gain['high']:.4f}], {-gain['change']:.1%} "
                f"[{-gain['change_high']:.1%}, {-gain['change_low']:.1%}], over {gain['documents']} documents"
            )
        if part["predictions"]:
            _show_predictions(terminal, part)


def _show_predictions(terminal: Terminal, part: Mapping[str, Any]) -> None:
    """Bytes and seconds by kind of link, and load per device."""
    links = part["links"]
    rows, nbytes = [], []
    for found in part["predictions"]:
        for name, price in found["sending"].items():
            label = (found["placement"], name.removeprefix("once "))
            both = [price["links"][kind] for kind in ("intra", "inter")]
            times = [_seconds(link["seconds_out"] + link["seconds_back"]) for link in both]
            rows.append((*label, *(link["rows"] for link in both), *times, _seconds(price["seconds"])))
            nbytes.append((*label, *(size(link[f"bytes_{way}"]) for way in ("out", "back") for link in both)))
    where = f"{part['devices']} devices in {links['nodes']} node{'s' if links['nodes'] > 1 else ''}"
    once = ("placement", "sent once")
    title = f"{where}: rows out, and time there and back; inside and across nodes"
    terminal.table(title, (*once, "rows in", "across", "time in", "across", "in all"), rows)
    title = f"bytes of these rows, {links['dtype']}, ids and weights included"
    terminal.table(title, (*once, "out, in", "across", "back, in", "across"), nbytes)
    loads = [
        (found["placement"], found["imbalance"], found["worst_imbalance"], _loads(found["load"]))
        for found in part["predictions"]
    ]
    terminal.table("choices computed by each device", ("placement", "max/mean", "worst layer", "load"), loads)


def _loads(load: list[int]) -> str:
    if len(load) <= _MOST_LOADS:
        return " ".join(f"{count:,}" for count in load)
    return f"{min(load):,} to {max(load):,}"


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}" if seconds else "0"
    raise AssertionError
