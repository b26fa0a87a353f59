"""`moekit super-experts`: find the experts without which a model breaks, and check whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.cli._terminal import Terminal
from moekit.cli.views._costs import ratio_of

# What stands in the table for the step's names of origins.
_MADE_BY = {"experts": "several experts", "dense": "dense FFN", "layer": "dense layer"}
_SHARED = -1


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was found, where the massive activations are, and whether the model breaks."""
    _show_streams(terminal, results["streams"])
    _show_experts(terminal, results["report"], results["room"])
    if results["check"] is not None:
        _show_check(terminal, results["check"])
    terminal.say(results["verdict"])
    if results["check_verdict"] is not None:
        terminal.say(results["check_verdict"])
    if results["protect"]:
        where = results["file"] or "super"  # without a folder, prune finds them itself
        terminal.say(f"to keep them: moekit prune ... --protect {where}")
    elif any(told["expert"] == _SHARED for told in results["report"]["found"]):
        terminal.say("shared experts need no protection: no method drops them")


def _show_streams(terminal: Terminal, streams: list[Mapping[str, Any]]) -> None:
    rows = [
        (
            told["layer"],
            told["kind"],
            told["value"],
            told["channel"],
            told["position"],
            told["median"],
            told["gain"],
            made_by(told),
        )
        for told in streams
    ]
    columns = ("layer", "block", "largest |H|", "channel", "position", "median |H|", "block adds", "massive: made by")
    terminal.table("the residual stream after each layer", columns, rows)


def made_by(told: Mapping[str, Any]) -> str | None:
    """What makes a layer's massive activation, in words; None where nothing is massive."""
    if not told["massive"]:
        return None
    if told["origin"] == "routed":
        return f"expert {told['expert']}"
    if told["origin"] == "shared":
        return "shared expert"
    return _MADE_BY.get(told["origin"], str(told["origin"]))


def _show_experts(terminal: Terminal, report: Mapping[str, Any], room: int) -> None:
    rows = [
        (
            "super" if mark else "",
            told["layer"],
            _name(told["expert"]),
            told["value"],
            told["channel"],
            told["position"],
            told["over_percentile"],
            told["over_ratio"],
            told["forms"],
        )
        for mark, which in ((True, report["found"]), (False, report["others"]))
        for told in which
    ]
    rule = report["rule"]
    columns = ("", "layer", "expert", "largest |output|", "channel", "position", "/ percentile", "/ share", "forms")
    terminal.table("experts of the largest outputs", columns, rows)
    terminal.say(
        f"a super expert exceeds percentile {rule['percentile']:g} ({report['percentile']:.4g}; at most {room} can) "
        f"and {rule['ratio']:g} of the largest ({report['largest']:.4g}), in a layer that forms a massive activation; "
        f"{report['tokens']:,} tokens"
    )


def _name(expert: int) -> str:
    return "shared" if expert == _SHARED else str(expert)


def _show_check(terminal: Terminal, check: Mapping[str, Any]) -> None:
    told = [(check["without"]["b"], check["pairs"], check["without"])]
    told += [("others", control["pairs"], control["text"]) for control in check["controls"]]
    parts = [text["overall"] for _, _, text in told]
    rows: list[tuple[Any, ...]] = [("unchanged", None, parts[0]["a"]["perplexity"], None, None, None)]
    for (name, pairs, _), part in zip(told, parts, strict=True):
        listed = " ".join(f"{layer}:{_name(expert)}" for layer, expert in pairs)
        rows.append((name, listed, part["b"]["perplexity"], *ratio_of(part["difference"])))
    against = check["against"]["overall"]
    rows.append(("super, against others", None, None, *ratio_of(against["difference"])))
    first = parts[0]["a"]
    title = f"held-out text ({first['documents']} documents, {first['tokens']:,} tokens), 95 % intervals"
    terminal.table(title, ("model", "skipped", "perplexity", "x", "low", "high"), rows)
