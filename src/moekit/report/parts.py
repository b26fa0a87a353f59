"""The parts that sections of a report are made of: plain typed numbers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from moekit.errors import BadData, NumericFault

__all__ = [
    "Axis",
    "BarGroup",
    "BarSeries",
    "Cell",
    "Column",
    "FiniteFloat",
    "HeatmapPanel",
    "Interval",
    "LineChart",
    "Matrix",
    "Part",
    "Point",
    "Reference",
    "Series",
    "Table",
]


class Part(BaseModel):
    """Base of all parts of a report: frozen, no unknown fields, no NaN; a bad value raises one of our errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = error.errors()
            # A union reports every member that failed; what a number failed for says most.
            first = next((e for e in found if e["type"] == "finite_number"), found[0])
            where = ".".join(map(str, (type(self).__name__, *first["loc"])))
            kind = NumericFault if first["type"] == "finite_number" else BadData
            raise kind(f"{where}: {first['msg']}", hint="a report shows finite numbers of the stated shapes") from error


class Interval(Part):
    """An estimate with its 95 % interval; a percentile interval of few, skewed values need not hold the estimate."""

    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if self.low > self.high:
            raise ValueError(f"the interval's lower end {self.low} is above its upper end {self.high}")
        return self


Cell = str | int | FiniteFloat | Interval | None


class Column(Part):
    """How a column of a table reads.

    Attributes:
        name: its heading.
        digits: digits after the point.
        unit: "%" shows a fraction as per cent, "B" bytes with a suiting prefix, "p" a p-value; else it is put behind.
        signed: show a plus sign.
        better: which direction is good, for colouring intervals that exclude zero.
        note: a sentence on what it means.
    """

    name: str
    digits: int = Field(3, ge=0, le=9)
    unit: str = ""
    signed: bool = False
    better: Literal["low", "high"] | None = None
    note: str = ""


class Table(Part):
    """Rows under columns; the first column heads each row."""

    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns")
        return self


class Point(Part):
    """A point of a chart, with its 95 % interval in either direction where known."""

    x: FiniteFloat
    y: FiniteFloat
    x_low: FiniteFloat | None = None
    x_high: FiniteFloat | None = None
    y_low: FiniteFloat | None = None
    y_high: FiniteFloat | None = None
    label: str = ""


class Series(Part):
    """Points of one kind.

    Attributes:
        name: for the legend.
        points: in drawing order.
        connect: draw a line through them.
        markers: draw each point.
        band: shade between the points' lower and upper ends, instead of a bar at each.
    """

    name: str
    points: tuple[Point, ...] = Field(min_length=1)
    connect: bool = True
    markers: bool = True
    band: bool = False


class Axis(Part):
    """An axis.

    Attributes:
        label: what and in which unit.
        unit: "%" shows fractions as per cent.
        zero: let the axis begin at zero.
    """

    label: str
    unit: str = ""
    zero: bool = False


class Reference(Part):
    """A dashed line across a chart at one value of x or y."""

    axis: Literal["x", "y"]
    value: FiniteFloat
    label: str


class LineChart(Part):
    """One chart of lines or points."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...] = Field(min_length=1)
    references: tuple[Reference, ...] = ()


class BarSeries(Part):
    """Values of one kind for each category."""

    name: str
    values: tuple[FiniteFloat, ...]


class BarGroup(Part):
    """Bars shown together, such as those of one layer.

    Attributes:
        name: for the selector.
        series: beside each other.
        caption: one line of text that goes with the group.
    """

    name: str
    series: tuple[BarSeries, ...] = Field(min_length=1)
    caption: str = ""


class Matrix(Part):
    """A square matrix to show as a heat map.

    Attributes:
        values: rows; not negative.
        names: what each row and column stands for, in the order shown.
        blocks: sizes of consecutive blocks to outline.
        caption: one line of text that goes with it.
    """

    values: tuple[tuple[FiniteFloat, ...], ...] = Field(min_length=1)
    names: tuple[str, ...]
    blocks: tuple[int, ...] = ()
    caption: str = ""

    @model_validator(mode="after")
    def _square(self) -> Matrix:
        size = len(self.values)
        if any(len(row) != size for row in self.values) or len(self.names) != size:
            raise ValueError(f"a heat map of {size} rows needs {size} columns and {size} names")
        if min(min(row) for row in self.values) < 0:
            raise ValueError("a heat map shows values from zero upwards")
        if self.blocks and sum(self.blocks) != size:
            raise ValueError(f"blocks of {self.blocks} do not cover {size} rows")
        return self


class HeatmapPanel(Part):
    """The same quantity for each layer."""

    name: str
    layers: tuple[Matrix, ...] = Field(min_length=1)
