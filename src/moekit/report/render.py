"""Each kind of section as HTML."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from moekit.report.charts.bars import bars
from moekit.report.charts.heatmaps import LEVELS, heatmap, maximum, payload
from moekit.report.charts.lines import line_chart, marker
from moekit.report.data import BarsSection, HeatmapsSection, LinesSection, TableSection, TextSection
from moekit.report.markup import join, number, tag
from moekit.report.parts import Table
from moekit.report.tables import behind_bars, behind_heatmaps, behind_lines, table


def section(content: Any) -> Markup:
    """Render a section of any kind, without its heading."""
    return RENDERERS[content.kind](content)


def embedded(values: Any) -> Markup:
    """Data for the page's script, in a block that can't be left by what the data say."""
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json">{safe}</script>')


def _text(content: TextSection) -> Markup:
    return join(tag("p", paragraph, class_="lead") for paragraph in content.paragraphs)


def _tables(content: TableSection) -> Markup:
    return join(table(t) for t in content.tables)


def _lines(content: LinesSection) -> Markup:
    figures = [
        tag(
            "figure",
            tag("h3", chart.title) if len(content.charts) > 1 else "",
            line_chart(chart, alone=len(content.charts) == 1),
        )
        for chart in content.charts
    ]
    names = list(dict.fromkeys(s.name for c in content.charts for s in c.series))
    longest = max(content.charts, key=lambda c: len(c.series))
    order = [s.name for s in longest.series] if {s.name for s in longest.series} == set(names) else names
    legend = [
        tag("li", tag("svg", marker(i, 8, 8), viewBox="0 0 16 16", aria_hidden="true"), name)
        for i, name in enumerate(order)
    ]
    one = len(content.charts) == 1
    parts = [tag("div", *figures, class_="charts one" if one else "charts")]
    if len(order) > 1:
        parts.append(tag("ul", *legend, class_="legend"))
    return join([*parts, _numbers(behind_lines(content))])


def _bars(content: BarsSection) -> Markup:
    names = [s.name for s in content.groups[0].series]
    legend = [
        tag(
            "li",
            tag(
                "svg",
                tag("rect", class_=f"f{i % 6}", width=12, height=12),
                class_="swatch",
                viewBox="0 0 12 12",
                aria_hidden="true",
            ),
            name,
        )
        for i, name in enumerate(names)
    ]
    data = {
        "categories": content.categories,
        "x": content.x,
        "unit": content.y.unit,
        "groups": [
            {"name": g.name, "caption": g.caption, "series": [s.model_dump() for s in g.series]} for g in content.groups
        ],
    }
    return tag(
        "figure",
        _picker([g.name for g in content.groups], content.title),
        tag("div", bars(content), class_="bars"),
        tag("figcaption", content.groups[0].caption, aria_live="polite"),
        tag("ul", *legend, class_="legend") if len(names) > 1 else "",
        _numbers(behind_bars(content)),
        embedded(data),
        class_="barchart",
    )


def _heatmaps(content: HeatmapsSection) -> Markup:
    top = maximum(content, 0)
    panels = [
        tag(
            "figure",
            tag("h3", panel.name),
            heatmap(panel.layers[0], top, f"{panel.name}, {content.layers[0]}. {panel.layers[0].caption}"),
            tag("span", content.down, class_="down note"),
            tag("span", content.across, class_="across note"),
            tag("figcaption", panel.layers[0].caption, aria_live="polite"),
        )
        for panel in content.panels
    ]
    return tag(
        "figure",
        _picker(list(content.layers), content.title),
        tag("div", *panels, class_="heat"),
        _ramp(top, content.unit),
        _numbers(behind_heatmaps(content)),
        embedded(payload(content)),
        class_="heatmaps",
    )


def _ramp(top: float, unit: str) -> Markup:
    """Legend of the colours; a colour's place is the square root of its value's share of the maximum."""
    steps = [tag("rect", class_=f"h{i}", x=i, width=1.02, height=1) for i in range(LEVELS)]
    drawn = tag("svg", *steps, viewBox=f"0 0 {LEVELS} 1", preserveAspectRatio="none", aria_hidden="true")
    digits = 1 if unit == "%" else 3
    return tag(
        "div",
        tag("span", number(0.0, 0, unit)),
        drawn,
        tag("span", number(top, digits, unit), data_share="1"),
        tag("span", "half-way: ", tag("span", number(top / 4, digits, unit), data_share="0.25")),
        class_="ramp",
    )


def _picker(names: list[str], title: str) -> Markup:
    """Chooses a layer; shown by the page's script, since without it nothing would move."""
    return tag(
        "div",
        tag("span", names[0], class_="which"),
        tag("button", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", type="button", aria_label="previous"),
        Markup('<input type="range" min="0" max="{}" step="1" value="0" aria-label="{}">').format(
            len(names) - 1, f"{title}: which layer"
        ),
        tag("button", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}", type="button", aria_label="next"),
        class_="pick",
        hidden="",
    )


def _numbers(content: Table) -> Markup:
    return tag("details", tag("summary", "The numbers"), table(content))


RENDERERS: dict[str, Callable[[Any], Markup]] = {
    "text": _text,
    "table": _tables,
    "lines": _lines,
    "bars": _bars,
    "heatmaps": _heatmaps,
}
