"""Tables as HTML, with a small drawing beside each interval, and the tables that stand behind charts."""

from __future__ import annotations

from markupsafe import Markup

from moekit.report.charts.heatmaps import maximum
from moekit.report.data import BarsSection, HeatmapsSection, LinesSection
from moekit.report.markup import cell, join, number, tag, verdict
from moekit.report.parts import Cell, Column, Interval, Table

_WIDTH, _HEIGHT = 96.0, 18.0


def table(content: Table) -> Markup:
    """Draw a table; it scrolls sideways where the page is narrow."""
    head = tag("tr", *(_heading(i, c, content) for i, c in enumerate(content.columns)))
    scales = [_scale(content, i) for i in range(len(content.columns))]
    numeric = [_numeric(content, i) for i in range(len(content.columns))]
    body = [
        tag("tr", *(_cell(row[i], c, i, scales[i], numeric[i]) for i, c in enumerate(content.columns)))
        for row in content.rows
    ]
    caption = tag("caption", content.caption) if content.caption else Markup("")
    notes = [tag("li", tag("b", c.name), ": ", c.note) for c in content.columns if c.note]
    whole = tag("table", caption, tag("thead", head), tag("tbody", *body))
    scroller = tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=content.caption or "table")
    return join((scroller, tag("ul", *notes, class_="notes"))) if notes else scroller


def _numeric(content: Table, index: int) -> bool:
    return any(row[index] is not None and not isinstance(row[index], str) for row in content.rows)


def _heading(index: int, column: Column, content: Table) -> Markup:
    return tag("th", column.name, scope="col", class_="number" if _numeric(content, index) else None)


def _scale(content: Table, index: int) -> tuple[float, float] | None:
    """Common range of a column of differences, with zero in it; other intervals are not drawn."""
    found = [row[index] for row in content.rows]
    intervals = [v for v in found if isinstance(v, Interval)]
    if not intervals or not content.columns[index].signed:
        return None
    low, high = min(0.0, *(v.low for v in intervals)), max(0.0, *(v.high for v in intervals))
    return (low, high) if high > low else (low - 1, high + 1)


def _cell(value: Cell, column: Column, index: int, scale: tuple[float, float] | None, numeric: bool) -> Markup:
    text = cell(value, column)
    if index == 0:
        return tag("th", text, scope="row")
    if isinstance(value, Interval) and scale is not None:
        drawing = _whisker(value, scale)
        return tag("td", tag("span", text, class_="value"), drawing, class_=f"number interval {verdict(value, column)}")
    return tag("td", text, class_="number" if numeric else None)


def _whisker(value: Interval, scale: tuple[float, float]) -> Markup:
    low, high = scale

    def at(v: float) -> float:
        return 4 + (v - low) / (high - low) * (_WIDTH - 8)

    middle = _HEIGHT / 2
    way = f"M{at(value.low):.1f} {middle:.0f}H{at(value.high):.1f}"
    way += "".join(f"M{at(v):.1f} {middle - 3:.0f}v6" for v in (value.low, value.high))
    return tag(
        "svg",
        tag("path", class_="zero", d=f"M{at(0.0):.1f} 0V{_HEIGHT:.0f}"),
        tag("path", class_="way", d=way),
        tag("circle", class_="dot", cx=at(value.mean), cy=middle, r=3.2),
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        class_="whisker",
        aria_hidden="true",
    )


def behind_lines(section: LinesSection) -> Table:
    """The points of all charts."""
    rows: list[tuple[Cell, ...]] = []
    for chart in section.charts:
        for series in chart.series:
            for p in series.points:
                x, y = (
                    v if low is None or high is None else Interval(mean=v, low=low, high=high)
                    for v, low, high in ((p.x, p.x_low, p.x_high), (p.y, p.y_low, p.y_high))
                )
                rows.append((chart.title, series.name, p.label, x, y))
    first = section.charts[0]
    columns = (
        Column(name="chart"),
        Column(name="series"),
        Column(name="point"),
        Column(name=first.x.label, unit="%" if first.x.unit == "%" else "", digits=2 if first.x.unit == "%" else 4),
        Column(name=first.y.label, unit="%" if first.y.unit == "%" else "", digits=2 if first.y.unit == "%" else 4),
    )
    return Table(columns=columns, rows=tuple(rows), caption=section.title)


def behind_bars(section: BarsSection) -> Table:
    """The bars of all groups, one row for each series of each group."""
    columns = (Column(name="group"), Column(name="series"), *(Column(name=c) for c in section.categories))
    rows = tuple((g.name, s.name, *s.values) for g in section.groups for s in g.series)
    return Table(columns=columns, rows=rows, caption=f"{section.title}: {section.y.label}")


def behind_heatmaps(section: HeatmapsSection) -> Table:
    """What each heat map's caption says; all cells are in the JSON file."""
    columns = (Column(name="layer"), *(Column(name=p.name) for p in section.panels), Column(name="darkest cell"))
    rows = tuple(
        (name, *(p.layers[i].caption for p in section.panels), number(maximum(section, i), 2, section.unit))
        for i, name in enumerate(section.layers)
    )
    return Table(columns=columns, rows=rows, caption=section.title)
