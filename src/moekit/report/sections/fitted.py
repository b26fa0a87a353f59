"""Models that the run made fit: what every kind of compression costs at which bytes, and the planner's front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.report.data import Finding, LinesSection
from moekit.report.parts import Axis, LineChart, Point, Series
from moekit.report.results import StepResult

_USE = "fit"
_GIB = 1 << 30
# Beginning of a plan's name -> what its points are called.
_KINDS = {"plan": "planned", "random": "drawn by chance"}


def fitted_section(finished: Sequence[StepResult]) -> LinesSection | None:
    """A chart for each model and unit of costs: measured loss over bytes, kind by kind; None without any such step.

    Args:
        finished: steps of the run.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for done in finished:
        if done.use == _USE and any(told["measured"] is not None for told in done.results.get("tried", ())):
            groups.setdefault((done.results["model"], done.results["price"]), []).append(done.results)
    if not groups:
        return None
    return LinesSection(
        title="Loss over bytes",
        lead="What each kind of compression alone makes of a number of bytes, what the planner makes of them, and "
        "plans drawn by chance. Lower and further to the left is better.",
        note="Measured: KL of the unchanged model's predictions to the smaller one's on held-out text, nats a token. "
        "The front is what the planner expects, measured for none of its points but those that are marked as planned.",
        charts=tuple(_chart(model, several) for (model, _), several in groups.items()),
    )


def _chart(model: str, several: Sequence[Mapping[str, Any]]) -> LineChart:
    points: dict[str, list[Point]] = {}
    for results in several:
        for told in results["tried"]:
            if told["measured"] is not None:
                label = told["name"] if len(several) == 1 and told["name"] == results["name"] else ""
                point = Point(x=told["bytes"] / _GIB, y=told["measured"], label=label)
                names = {_kind(told["name"]), _KINDS.get(told["name"].split()[0], "")} - {""}
                for name in names:
                    points.setdefault(name, []).append(point)
    nats = [results for results in several if results["price"] == "fisher"]
    front = {told["bytes"]: told["expected"] for results in nats for told in results["front"]}
    series = [
        Series(name=name, points=tuple(sorted(some, key=lambda p: p.x)), connect=name not in _KINDS.values())
        for name, some in sorted(points.items(), key=lambda item: item[0] != _KINDS["plan"])
    ]
    if front:
        line = tuple(Point(x=nbytes / _GIB, y=cost) for nbytes, cost in sorted(front.items()))
        series.insert(0, Series(name="front, expected", points=line, markers=False))
    return LineChart(
        title=model,
        x=Axis(label="GiB of weights, packed where the engine packs them"),
        y=Axis(label="measured KL, nats a token", zero=True),
        series=tuple(series),
    )


def _kind(name: str) -> str:
    """What a plan is, by its name: one kind alone, also where the planner found the same."""
    single = name.partition("(")[2].rstrip(")") or name
    return _KINDS.get(single.split()[0], single)


def fitted_finding(finished: Sequence[StepResult]) -> list[Finding]:
    """In a sentence for each model that was made to fit: what it costs, and what the best single kind would have."""
    found = []
    for done in finished:
        told = done.results
        if done.use != _USE or told.get("measured") is None:
            continue
        singles = {t["name"]: t["measured"] for t in told["tried"] if _kind(t["name"]) not in _KINDS.values()}
        others = {name: measured for name, measured in singles.items() if name != told["name"]}
        text = f"{done.id}: {told['bytes']['after'] / told['bytes']['before']:.0%} of the bytes cost "
        text += f"{told['measured']:.4f} nats a token by the best plan"
        if others:
            best = min(others, key=lambda name: others[name])
            text += f"; {_kind(best)} would cost {others[best]:.4f}"
        ranks = told.get("correlation")
        detail = "" if ranks is None else f"Rank correlation of expected and measured costs: {ranks:.2f}."
        found.append(Finding(text=f"{text}.", detail=detail))
    return found
