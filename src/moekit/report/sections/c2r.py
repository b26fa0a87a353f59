"""What a routing constraint adds beyond placement alone: the curve of quality against rows, and the first line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from moekit.report.data import Finding, KeyFigure, LinesSection
from moekit.report.markup import number
from moekit.report.parts import Axis, FiniteFloat, Interval, LineChart, Part, Point, Reference, Series
from moekit.report.verdict import FLAT, degenerate, flat

# A cost that a user may be expected to accept: the headline is about the point that saves most within it.
TOLERANCE = 0.01


class CurvePoint(Part):
    """One routing, placed as well as it can be, each token sent once per device.

    Attributes:
        name: such as "T = 8"; for labels.
        kind: "list" for partner lists, "device" for the device-first variant.
        rows: sent per token and layer.
        saving: rows relative to placement alone, paired over documents: -0.1 is a tenth fewer.
        cost: perplexity relative to plain top-k, paired over documents: 0.01 is a hundredth more.
        load: busiest device's load over the mean device's.
        trained_alike: whether both models come from the same start, trained with the same settings on the same text.
    """

    name: str
    kind: Literal["list", "device"] = "list"
    rows: FiniteFloat
    saving: Interval
    cost: Interval
    load: FiniteFloat | None = None
    trained_alike: bool = False


class Curve(Part):
    """All routings on one number of devices.

    Attributes:
        devices: D.
        top_k: k, experts of a token; what once-per-expert sending sends.
        placed: rows per token and layer of plain top-k under the best placement: placement alone.
        contiguous: the same with the experts where they are.
        points: of the constraint.
    """

    devices: int = Field(ge=1)
    top_k: int = Field(ge=1)
    placed: FiniteFloat
    contiguous: FiniteFloat | None = None
    points: tuple[CurvePoint, ...] = Field(min_length=1)

    def failure(self) -> str | None:
        """Why the curve says nothing, if so. The device-first point is apart: it sends one row by construction."""
        rows = [self.placed, *(p.rows for p in self.points if p.kind == "list")]
        return degenerate(rows, devices=self.devices, top_k=self.top_k)

    def chosen(self) -> CurvePoint:
        """The point that saves most rows among those whose cost is surely within `TOLERANCE`; else the cheapest one."""
        affordable = [p for p in self.points if p.cost.high <= TOLERANCE]
        if affordable:
            return min(affordable, key=lambda p: p.saving.mean)
        return min(self.points, key=lambda p: p.cost.mean)


def headline(curves: Sequence[Curve], devices: int | None = None) -> Finding:
    """The first line of the page: what the constraint adds beyond placement alone.

    Args:
        curves: one for each number of devices.
        devices: whose curve to speak of; the largest number by default, where most is sent.
    """
    curve = next((c for c in curves if c.devices == devices), None) or max(curves, key=lambda c: c.devices)
    reason = curve.failure()
    if reason is not None:
        return Finding(
            text=f"The measurement on {curve.devices} devices shows nothing: {reason}.",
            status="failure",
            detail="The rows of this curve cannot vary, so it can't tell what the constraint adds.",
        )
    point = curve.chosen()
    alone = f"placement alone sends {_percent(1 - curve.placed / curve.top_k)} fewer rows than once per expert"
    how = (
        f"On {curve.devices} devices {alone}. Of the points whose perplexity rises by surely no more than "
        f"{_percent(TOLERANCE, 0)} this one saves most."
        if point.cost.high <= TOLERANCE
        else f"On {curve.devices} devices {alone}. No point surely costs {_percent(TOLERANCE, 0)} or less; this is the "
        "cheapest one."
    )
    if flat([p.rows for p in curve.points], curve.placed):
        best = min(curve.points, key=lambda p: p.saving.mean)
        return Finding(
            text=f"The curve is flat: beyond placement alone the constraint saves next to nothing on {curve.devices} "
            f"devices, at most {_change(best.saving, 'fewer rows', 'more rows', 'paired 95 % interval ')} "
            f"with C2R, {best.name}.",
            detail=f"Flat means that no point saves {_percent(FLAT, 0)} of the rows. {alone[0].upper()}{alone[1:]}.",
        )
    saved = _change(point.saving, "fewer rows", "more rows", "paired 95 % interval ")
    words = f"Beyond placement alone, C2R ({point.name}) sends {saved} "
    words += f"between {curve.devices} devices, at {_change(point.cost, 'lower perplexity', 'higher perplexity')} than "
    words += "plain top-k fine-tuned alike." if point.trained_alike else "plain top-k."
    saves, costs = point.saving.high < 0, point.cost.low > 0
    status: Literal["good", "neutral"] = "good" if saves and not costs else "neutral"
    return Finding(text=words, status=status, detail=f"{how} Intervals are 95 %, paired over documents.")


def curve_findings(curves: Sequence[Curve]) -> tuple[Finding, ...]:
    """Further findings: degenerate curves (failures), flat ones, and whether any point costs anything measurable."""
    found = []
    for curve in curves:
        reason = curve.failure()
        if reason is not None:
            text = f"The curve for {curve.devices} devices is degenerate: {reason}."
            found.append(Finding(text=text, status="failure"))
        elif flat([p.rows for p in curve.points], curve.placed):
            text = f"On {curve.devices} devices no point saves {_percent(FLAT, 0)} of the rows beyond placement alone."
            found.append(Finding(text=text, detail="A flat curve is a result: here placement does all the work."))
    points = {p.name: p for c in curves for p in c.points}
    dear = [p for p in points.values() if p.cost.low > 0]
    if not dear:
        text = "No point of the curve costs perplexity that this text could show."
        worst = max(points.values(), key=lambda p: p.cost.high)
        found.append(Finding(text=text, detail=f"The largest cost within an interval is {_percent(worst.cost.high)}."))
    else:
        least = min(dear, key=lambda p: p.cost.mean)
        text = f"{len(dear)} of {len(points)} points cost measurable perplexity, from "
        text += f"{_change(least.cost, 'lower', 'higher')} ({least.name})"
        most = max(dear, key=lambda p: p.cost.mean)
        text += f" to {_change(most.cost, 'lower', 'higher')} ({most.name})." if most is not least else "."
        found.append(Finding(text=text, status="bad"))
    return tuple(found)


def key_figures(curves: Sequence[Curve]) -> tuple[KeyFigure, ...]:
    """For each number of devices: rows with placement alone, and with the constraint at its chosen point."""
    return tuple(
        KeyFigure(
            label=f"Rows per token, {c.devices} devices",
            value=f"{number(c.top_k, 0)} → {number(c.placed, 2)} → {number(c.chosen().rows, 2)}",
            note=f"once per expert → best placement → {_unbroken(c.chosen().name)}",
        )
        for c in curves
    )


def curve_section(
    curves: Sequence[Curve],
    *,
    title: str = "Quality against rows sent",
    lead: str = "",
    note: str = "",
) -> LinesSection:
    """A chart for each number of devices: rows per token across, perplexity against the baseline up.

    Args:
        curves: one for each number of devices.
        title: heading.
        lead: what to see.
        note: how it was measured.
    """
    return LinesSection(title=title, lead=lead, note=note, charts=tuple(map(_chart, curves)))


def _chart(curve: Curve) -> LineChart:
    lists = sorted((p for p in curve.points if p.kind == "list"), key=lambda p: p.rows)
    firsts = [p for p in curve.points if p.kind == "device"]
    series = [Series(name="plain top-k, best placement", points=(Point(x=curve.placed, y=0, label="placement alone"),))]
    if lists:
        series.append(Series(name="C2R, partner lists", points=tuple(_point(p, curve) for p in lists)))
    if firsts:
        series.append(Series(name="C2R, device first", points=tuple(_point(p, curve) for p in firsts)))
    references = [Reference(axis="y", value=0, label="")]
    if curve.contiguous is not None:
        references.append(Reference(axis="x", value=curve.contiguous, label="contiguous"))
    return LineChart(
        title=f"{curve.devices} devices",
        x=Axis(label="rows per token and layer"),
        y=Axis(label="perplexity against plain top-k", unit="%"),
        series=tuple(series),
        references=tuple(references),
    )


def _point(p: CurvePoint, curve: Curve) -> Point:
    return Point(
        x=p.rows,
        y=p.cost.mean,
        y_low=p.cost.low,
        y_high=p.cost.high,
        x_low=p.rows + (p.saving.low - p.saving.mean) * curve.placed,
        x_high=p.rows + (p.saving.high - p.saving.mean) * curve.placed,
        label=p.name,
    )


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _percent(value: float, digits: int = 1) -> str:
    return number(value, digits, "%")


def _change(change: Interval, less: str, more: str, what: str = "") -> str:
    """A relative change in words, with its interval, such as "8.1 % fewer rows (7.6 % to 8.6 %)"."""
    down = change.mean < 0
    size, a, b = (-change.mean, -change.high, -change.low) if down else (change.mean, change.low, change.high)
    return f"{_percent(size)} {less if down else more} ({what}{_percent(a)} to {_percent(b)})"
