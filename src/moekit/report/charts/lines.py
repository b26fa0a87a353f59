"""Lines and points with error bars in both directions."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from moekit.report.charts.frame import Box, Frame, left_margin, place_label, scale, x_axis, y_axis
from moekit.report.markup import join, number, tag
from moekit.report.parts import Axis, LineChart, Point, Series

# A chart alone gets more width, so that its text is as large as in charts beside each other.
WIDTHS, HEIGHT, TOP, BOTTOM, RIGHT = (350.0, 680.0), 290.0, 30.0, 48.0, 14.0
COLOURS = 6
_CAP = 3.5


def line_chart(chart: LineChart, *, alone: bool = False) -> Markup:
    """Draw one chart.

    Args:
        chart: what to draw.
        alone: it has the page's width to itself.
    """
    frame = _frame(chart, WIDTHS[alone])
    taken: list[Box] = []
    for series in chart.series:
        for p in series.points:
            taken += _boxes(frame, p, series.markers)
    # The first series, the baseline, comes last: on top of what coincides with it.
    drawn = [_series(frame, s, i, chart, taken) for i, s in reversed(list(enumerate(chart.series)))]
    return tag(
        "svg",
        y_axis(frame, chart.y),
        x_axis(frame, chart.x),
        _references(frame, chart, taken),
        *drawn,
        viewBox=f"0 0 {frame.width:.0f} {HEIGHT:.0f}",
        role="group",
        aria_label=f"{chart.title}: {chart.y.label} against {chart.x.label}. The numbers are in the table below.",
    )


def marker(index: int, x: float, y: float) -> Markup:
    """Draw the mark of the series number `index`: each has its own shape, so that colour is not all that tells."""
    shapes = (
        f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        f"M{x:.1f} {y - 5.5:.1f}l5 9h-10z",
        f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        f"M{x:.1f} {y + 5.5:.1f}l5 -9h-10z",
        f"M{x - 1.5:.1f} {y - 5:.1f}h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    )
    return tag("path", class_=f"mark f{index % COLOURS}", d=shapes[index % len(shapes)])


def describe(point: Point, chart: LineChart, name: str) -> str:
    """One point in words, for tooltips and screen readers."""
    head = f"{name}, {point.label}" if point.label else name
    return f"{head}: {chart.x.label} {_value(point.x, point.x_low, point.x_high, chart.x)}; {chart.y.label} " + _value(
        point.y, point.y_low, point.y_high, chart.y
    )


def _value(mean: float, low: float | None, high: float | None, axis: Axis) -> str:
    digits = 2 if axis.unit == "%" else 4
    text = number(mean, digits, axis.unit)
    if low is None or high is None:
        return text
    return f"{text} [{number(low, digits, axis.unit)}, {number(high, digits, axis.unit)}]"


def _frame(chart: LineChart, width: float) -> Frame:
    points = [p for s in chart.series for p in s.points]
    xs = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None]
    ys = [v for p in points for v in (p.y, p.y_low, p.y_high) if v is not None]
    xs += [r.value for r in chart.references if r.axis == "x"]
    ys += [r.value for r in chart.references if r.axis == "y"]
    y = scale(ys, HEIGHT - BOTTOM, TOP, zero=chart.y.zero)
    left = left_margin(y.ticks(), y.step, chart.y.unit)
    # Layers and counts: no tick between two of them.
    whole = not chart.x.unit and all(float(v).is_integer() for v in xs)
    return Frame(width, HEIGHT, scale(xs, left, width - RIGHT, zero=chart.x.zero, tight=True, whole=whole), y)


def _boxes(frame: Frame, point: Point, marked: bool) -> Iterable[Box]:
    """Where a point is drawn, so that labels keep clear of it."""
    x, y = frame.x(point.x), frame.y(point.y)
    if marked:
        yield x - 5, y - 5, x + 5, y + 5
    if point.x_low is not None and point.x_high is not None:
        yield frame.x(point.x_low), y - 2, frame.x(point.x_high), y + 2
    if point.y_low is not None and point.y_high is not None:
        yield x - 2, frame.y(point.y_high), x + 2, frame.y(point.y_low)


def _references(frame: Frame, chart: LineChart, taken: list[Box]) -> Markup:
    parts = []
    for r in chart.references:
        at = frame.x(r.value) if r.axis == "x" else frame.y(r.value)
        ends = (
            {"x1": at, "x2": at, "y1": frame.y.start, "y2": frame.y.end}
            if r.axis == "x"
            else {"x1": frame.left, "x2": frame.right, "y1": at, "y2": at}
        )
        parts.append(tag("line", class_="reference", **ends))
        x, y = (at, frame.y.end + 8) if r.axis == "x" else (frame.left, at)
        found = place_label(r.label, x, y, taken, (frame.left, 0, frame.width, HEIGHT))
        if found:
            parts.append(tag("text", r.label, class_="note", x=found[0], y=found[1]))
    return join(parts)


def _series(frame: Frame, series: Series, index: int, chart: LineChart, taken: list[Box]) -> Markup:
    parts = [_band(frame, series, index)] if series.band else []
    if series.connect and len(series.points) > 1:
        way = "L".join(f"{frame.x(p.x):.1f} {frame.y(p.y):.1f}" for p in series.points)
        # All but the lowest have gaps, so that curves that coincide are both seen.
        gaps = f" d{index % COLOURS}" if index < len(chart.series) - 1 else ""
        parts.append(tag("path", class_=f"line s{index % COLOURS}{gaps}", d=f"M{way}"))
    within = (frame.left, frame.y.end - 8, frame.width, frame.y.start)
    for p in series.points:
        x, y = frame.x(p.x), frame.y(p.y)
        inner = [tag("title", describe(p, chart, series.name))]
        if not series.band:
            inner.append(_whiskers(frame, p, index))
        inner.append(
            marker(index, x, y)
            if series.markers
            else tag("path", class_=f"mark f{index % COLOURS}", d=f"M{x - 2:.1f} {y:.1f}a2 2 0 1 0 4 0a2 2 0 1 0 -4 0z")
        )
        inner.append(tag("circle", class_="hit", cx=x, cy=y, r=11))
        parts.append(tag("g", *inner, class_="point", tabindex=0, role="img"))
        found = place_label(p.label, x, y, taken, within) if p.label else None
        if found:
            parts.append(tag("text", p.label, class_="label", x=found[0], y=found[1]))
    return join(parts)


def _band(frame: Frame, series: Series, index: int) -> Markup:
    """What lies between the ends of the points' intervals; a point without one closes the band."""
    above = [(frame.x(p.x), frame.y(p.y if p.y_high is None else p.y_high)) for p in series.points]
    below = [(frame.x(p.x), frame.y(p.y if p.y_low is None else p.y_low)) for p in series.points]
    way = "L".join(f"{x:.1f} {y:.1f}" for x, y in (*above, *reversed(below)))
    return tag("path", class_=f"band f{index % COLOURS}", d=f"M{way}Z")


def _whiskers(frame: Frame, point: Point, index: int) -> Markup:
    x, y = frame.x(point.x), frame.y(point.y)
    way = ""
    if point.x_low is not None and point.x_high is not None:
        a, b = frame.x(point.x_low), frame.x(point.x_high)
        way += f"M{a:.1f} {y:.1f}H{b:.1f}" + "".join(f"M{v:.1f} {y - _CAP:.1f}v{2 * _CAP:.0f}" for v in (a, b))
    if point.y_low is not None and point.y_high is not None:
        a, b = frame.y(point.y_low), frame.y(point.y_high)
        way += f"M{x:.1f} {a:.1f}V{b:.1f}" + "".join(f"M{x - _CAP:.1f} {v:.1f}h{2 * _CAP:.0f}" for v in (a, b))
    return tag("path", class_=f"whisker s{index % COLOURS}", d=way) if way else Markup("")
