from __future__ import annotations

import math

import pytest

from moekit.errors import BadData, NumericFault
from moekit.report.data import BarsSection, HeatmapsSection, ReportData, TableSection
from moekit.report.parts import Axis, BarGroup, BarSeries, Column, HeatmapPanel, Interval, Matrix, Point, Table


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_never_reaches_a_page(value):
    with pytest.raises(NumericFault, match=r"Point\.y"):
        Point(x=1.0, y=value)
    with pytest.raises(NumericFault):
        Table(columns=(Column(name="a"),), rows=((value,),))
    with pytest.raises(NumericFault):
        Matrix(values=((value,),), names=("0",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(mean=1.5, low=2.1, high=2.0), "above its upper end"),
        (lambda: Table(columns=(Column(name="a"),), rows=((1, 2),)), "row 0 has 2 cells"),
        (lambda: Matrix(values=((1.0, 2.0),), names=("0",)), "needs 1 columns"),
        (lambda: Matrix(values=((-1.0,),), names=("0",)), "from zero upwards"),
        (lambda: Matrix(values=((1.0,),), names=("0",), blocks=(2,)), "do not cover"),
        (lambda: Point(x=1.0, y=1.0, colour="red"), "Extra inputs"),
        (
            lambda: HeatmapsSection(
                title="t",
                layers=("0", "1"),
                panels=(HeatmapPanel(name="p", layers=(Matrix(values=((1.0,),), names=("0",)),)),),
            ),
            "1 layers, not 2",
        ),
        (
            lambda: BarsSection(
                title="t",
                categories=("a", "b"),
                groups=(BarGroup(name="g", series=(BarSeries(name="s", values=(1.0,)),)),),
                x="x",
                y=Axis(label="y"),
            ),
            "1 values",
        ),
        (lambda: TableSection(title="t", tables=()), "at least 1"),
    ],
)
def test_parts_that_do_not_fit_are_bad_data(make, message):
    with pytest.raises(BadData, match=message):
        make()


def test_a_report_survives_json(report):
    again = ReportData.model_validate_json(report.model_dump_json())
    assert again == report
    assert {s.kind for s in again.sections} == {"text", "table", "lines", "bars", "heatmaps"}


def test_a_report_is_frozen(report):
    with pytest.raises(Exception, match="frozen"):
        report.title = "other"
