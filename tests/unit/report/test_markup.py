from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from markupsafe import Markup

from moekit.report.markup import cell, number, tag, tick, verdict
from moekit.report.parts import Column, Interval

NB = "\N{NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1234.5678,), "1,234.568"),
        ((-0.5, 1), "−0.5"),
        ((0.5, 1, "", True), "+0.5"),
        ((-0.0004, 3, "", True), "0.000"),
        ((0.12345, 1, "%"), f"12.3{NB}%"),
        ((512, 1, "B"), f"512{NB}B"),
        ((1536, 1, "B"), f"1.5{NB}KiB"),
        ((3 * 2**40, 1, "B"), f"3.0{NB}TiB"),
        ((7.0, 0, "ms"), f"7{NB}ms"),
        ((0.00001, 3, "p"), "<0.001"),
        ((0.0321, 3, "p"), "0.032"),
    ],
)
def test_numbers(arguments, text):
    assert number(*arguments) == text


@pytest.mark.parametrize(
    ("value", "step", "unit", "text"),
    [
        (0.2, 0.2, "", "0.2"),
        (-5, 5, "", "−5"),
        (0.005, 0.005, "%", f"0.5{NB}%"),
        (0, 1, "", "0"),
    ],
)
def test_ticks_have_the_digits_their_step_needs(value, step, unit, text):
    assert tick(value, step, unit) == text


def test_cells():
    assert cell(None, Column(name="c")) == "–"
    assert cell("text", Column(name="c")) == "text"
    assert cell(12470, Column(name="c")) == "12,470"
    assert cell(0.5, Column(name="c", digits=1, unit="%")) == f"50.0{NB}%"
    interval = Interval(mean=0.0029, low=-0.0022, high=0.0068)
    assert cell(interval, Column(name="c", digits=2, unit="%", signed=True)) == f"+0.29{NB}% [−0.22, +0.68]"
    assert cell(Interval(mean=12.6, low=11.1, high=14.3), Column(name="c", digits=1)) == "12.6 [11.1, 14.3]"


def test_only_intervals_that_exclude_zero_are_good_or_bad():
    up, open_ = Interval(mean=1.0, low=0.5, high=2.0), Interval(mean=1.0, low=-0.5, high=2.0)
    down = Interval(mean=-1.0, low=-2.0, high=-0.5)
    assert verdict(up, Column(name="c", better="high")) == verdict(down, Column(name="c", better="low")) == "good"
    assert verdict(up, Column(name="c", better="low")) == verdict(down, Column(name="c", better="high")) == "bad"
    assert verdict(open_, Column(name="c", better="low")) == "open"
    assert verdict(up, Column(name="c")) == "open"


def test_elements():
    assert tag("a", "<b>", Markup("<i></i>"), class_="x", data_y=1.50, hidden=None) == (
        '<a class="x" data-y="1.5">&lt;b&gt;<i></i></a>'
    )


@given(st.text())
def test_text_stays_text(text):
    made = tag("a", text, title=text)
    assert made.count("<") == 2
    assert made.count('"') == 2
