from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, strategies as st

from moekit.report.charts.bars import bars
from moekit.report.charts.frame import nice_step, overlaps, place_label, scale
from moekit.report.charts.heatmaps import LEVELS, STEPS, cells, heatmap, level, outlines, pack
from moekit.report.charts.lines import line_chart
from moekit.report.data import BarsSection
from moekit.report.parts import Axis, BarGroup, BarSeries, LineChart, Matrix, Point, Reference, Series
from moekit.report.theme import style

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=20), st.booleans(), st.booleans())
def test_scales_cover_their_values_and_have_ticks(values, zero, tight):
    made = scale(values, 300, 20, zero=zero, tight=tight)
    slack = 1e-6 * (made.high - made.low)
    assert made.low <= min(values) + slack
    assert made.high >= max(values) - slack
    assert 1 <= len(made.ticks()) <= 14
    assert all(20 - 1e-6 <= made(t) <= 300 + 1e-6 for t in made.ticks())
    if zero:
        assert made.low <= slack
        assert made.high >= -slack


def test_rounding_noise_does_not_fill_a_chart():
    made = scale([2.0, 2.0 + 1e-15], 0, 1)
    assert made.high - made.low > 0.1


@pytest.mark.parametrize(("span", "step"), [(1.0, 0.2), (6.0, 1.0), (7.0, 2.0), (0.031, 0.01), (1200, 200)])
def test_steps_are_round(span, step):
    assert nice_step(span, 6) == pytest.approx(step)


@given(st.lists(st.tuples(st.floats(20, 300), st.floats(20, 200)), min_size=1, max_size=12))
def test_labels_never_cover_each_other_or_a_point(points):
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    taken = list(marks)
    for x, y in points:
        place_label("T = 16", x, y, taken, (0, 0, 340, 230))
    placed = taken[len(marks) :]
    for i, box in enumerate(placed):
        assert not any(overlaps(box, other) for other in (*marks, *placed[:i]))
        assert box[0] >= 0
        assert box[2] <= 340


def chart(**changes):
    series = (
        Series(name="one", points=(Point(x=1, y=0, label="a"), Point(x=2, y=4, y_low=3, y_high=5, label="b"))),
        Series(name="two", points=(Point(x=1.5, y=2, x_low=1.2, x_high=1.8, label="c"),)),
    )
    values = {"title": "t", "x": Axis(label="x"), "y": Axis(label="y"), "series": series} | changes
    return LineChart(**values)


def positions(drawn, kind):
    return [e for e in ET.fromstring(drawn).iter() if kind in e.get("class", "").split()]


def test_points_lie_where_their_values_are():
    drawn = line_chart(chart())
    hits = {g.find("title").text: g.find("circle[@class='hit']") for g in positions(drawn, "point")}
    at = {text.split(":")[0].split(", ")[1]: (float(c.get("cx")), float(c.get("cy"))) for text, c in hits.items()}
    assert at["c"][0] == pytest.approx((at["a"][0] + at["b"][0]) / 2, abs=0.02), "1.5 is half-way from 1 to 2"
    assert at["c"][1] == pytest.approx((at["a"][1] + at["b"][1]) / 2, abs=0.02), "2 is half-way from 0 to 4"
    assert at["b"][1] < at["a"][1], "larger values are higher up"


def test_error_bars_reach_their_ends():
    drawn = line_chart(chart())
    [vertical] = [p.get("d") for p in positions(drawn, "whisker") if "H" not in p.get("d")]
    top, bottom = (float(v) for v in re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", vertical).groups())
    grid = sorted({float(line.get("y1")) for line in positions(drawn, "grid")})
    unit = (grid[-1] - grid[0]) / 5
    assert abs(top - bottom) == pytest.approx(2 * unit, abs=0.2), "3 to 5 on an axis from 0 to 5"


def test_curves_that_coincide_are_both_seen():
    points = (Point(x=0, y=1), Point(x=1, y=2))
    drawn = line_chart(chart(series=tuple(Series(name=n, points=points, connect=True) for n in "abc")))
    lines = [set(e.get("class").split()) for e in positions(drawn, "line")]
    # Drawn from the last to the first: what lies above has gaps.
    assert [bool(classes & {"d0", "d1"}) for classes in lines] == [False, True, True]
    assert lines[1] & {"d0", "d1"} != lines[2] & {"d0", "d1"}
    assert ".d0{stroke-dasharray:" in style()


def test_layers_have_whole_ticks():
    few = chart(series=(Series(name="s", points=(Point(x=0, y=0.25), Point(x=2, y=0.5))),), x=Axis(label="layer"))
    root = ET.fromstring(line_chart(few))
    across = [e.text for e in root.iter("text") if {"tick", "middle"} <= set(e.get("class").split())]
    assert across == ["0", "1", "2"]


def test_every_point_says_its_numbers():
    texts = [t.text for t in ET.fromstring(line_chart(chart())).iter("title")]
    assert "one, b: x 2.0000; y 4.0000 [3.0000, 5.0000]" in texts
    assert len(texts) == 3


def test_references_and_equal_values_are_drawn():
    flat = chart(
        series=(Series(name="s", points=(Point(x=1, y=0), Point(x=1, y=0))),),
        references=(Reference(axis="x", value=1, label="here"), Reference(axis="y", value=0, label="")),
    )
    drawn = line_chart(flat, alone=True)
    assert len(positions(drawn, "reference")) == 2
    assert "nan" not in drawn


def test_bars_are_as_high_as_their_values():
    section = BarsSection(
        title="t",
        categories=("0", "1", "2"),
        groups=(
            BarGroup(name="g", series=(BarSeries(name="s", values=(0.0, 1.0, 2.0)),)),
            BarGroup(name="h", series=(BarSeries(name="s", values=(2.0, 0.0, 0.0)),)),
        ),
        x="expert",
        y=Axis(label="load", zero=True),
        reference=Reference(axis="y", value=1.0, label="even"),
    )
    drawn = bars(section)
    first, second = (p.get("d") for p in positions(drawn, "bar"))
    heights = [float(v) for v in re.findall(r"v(-?[\d.]+)h", first)]
    assert heights[0] == 0
    assert heights[2] == pytest.approx(2 * heights[1], abs=0.2)
    assert float(re.findall(r"v(-?[\d.]+)h", second)[0]) == heights[2], "groups share their scale"
    root = ET.fromstring(drawn)
    assert [g.get("class") for g in root.iter("g") if g.get("data-group")] == [None, "hidden"]
    # Whoever points at a bar is told the category under the pointer: the script divides this width evenly.
    left, right = float(root.get("data-left")), float(root.get("data-right"))
    starts = [float(v) for v in re.findall(r"M([\d.]+) ", first)]
    assert [int((x - left) / (right - left) * 3) for x in starts] == [0, 1, 2]


def area(ways, size):
    """Which level each cell is painted with."""
    painted = np.zeros((size, size), dtype=int)
    for shade, way in enumerate(ways):
        for c, r, n in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", way):
            assert (painted[int(r), int(c) : int(c) + int(n)] == 0).all(), "no cell twice"
            painted[int(r), int(c) : int(c) + int(n)] = shade
    return painted


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_heat_maps_paint_every_cell_in_its_level(size, seed):
    values = np.random.default_rng(seed).random((size, size)) ** 3
    top = values.max()
    painted = area(cells(pack(values.tolist(), top), size), size)
    wanted = np.minimum(LEVELS - 1, np.floor(np.sqrt(np.round(values / top * STEPS) / STEPS) * LEVELS)).astype(int)
    assert (painted == wanted).all()
    assert painted.max() == LEVELS - 1


def test_levels_and_outlines():
    assert level(0) == 0
    assert level(STEPS) == LEVELS - 1
    assert level(round(STEPS / 4)) == LEVELS // 2
    assert outlines((2, 1)) == "M0 0h2v2h-2zM2 2h1v1h-1z"


def test_an_empty_heat_map_is_drawn():
    drawn = heatmap(Matrix(values=((0.0, 0.0), (0.0, 0.0)), names=("0", "1")), 1.0, "nothing")
    root = ET.fromstring(drawn)
    assert root.get("aria-label") == "nothing"
    assert len(list(root.find("g"))) == 0
