"""Scales, ticks and the frame of a chart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moekit.report.markup import join, tag, tick
from moekit.report.parts import Axis

# Width of a character at the size of tick and point labels; system fonts differ little from it.
CHARACTER = 6.1


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: pixel.
        end: pixel.
        step: distance of ticks.
    """

    low: float
    high: float
    start: float
    end: float
    step: float

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values to label."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [i * self.step for i in range(first, last + 1)]


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts `span` into at most `most` parts."""
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    zero: bool = False,
    most: int = 6,
    tight: bool = False,
    whole: bool = False,
) -> Scale:
    """Make a scale that covers values; equal values get room on both sides.

    Args:
        values: what must be within.
        start: pixel of the low end.
        end: pixel of the high end.
        zero: include zero.
        most: how many parts the ticks may make.
        tight: end a little beyond the values instead of at round ones.
        whole: ticks at whole numbers only.
    """
    known = list(values)
    low, high = min(known), max(known)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    # A spread that is rounding noise only must not fill the chart.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(high) * 0.05 or 1.0
        low, high = (low, high + margin) if zero and low >= 0 else (low - margin, high + margin)
    step = nice_step(high - low, most)
    step = max(1.0, step) if whole else step
    if tight:
        margin = 0.04 * (high - low)
        return Scale(low if zero and low == 0 else low - margin, high + margin, start, end, step)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end, step)


@dataclass(frozen=True)
class Frame:
    """A chart's size and scales."""

    width: float
    height: float
    x: Scale
    y: Scale

    @property
    def left(self) -> float:
        """Left edge of the plotting area."""
        return min(self.x.start, self.x.end)

    @property
    def right(self) -> float:
        """Right edge of the plotting area."""
        return max(self.x.start, self.x.end)


def y_axis(frame: Frame, axis: Axis) -> Markup:
    """Grid lines, tick labels and title of the vertical axis."""
    rows = [
        join(
            (
                tag("line", class_="grid", x1=frame.left, x2=frame.right, y1=frame.y(v), y2=frame.y(v)),
                tag("text", tick(v, frame.y.step, axis.unit), class_="tick end", x=frame.left - 7, y=frame.y(v) + 4),
            )
        )
        for v in frame.y.ticks()
    ]
    return join([*rows, tag("text", axis.label, class_="axis", x=4, y=14)])


def x_axis(frame: Frame, axis: Axis) -> Markup:
    """Tick labels, base line and title of the horizontal axis."""
    base = frame.y.start
    marks = [
        tag("text", tick(v, frame.x.step, axis.unit), class_="tick middle", x=frame.x(v), y=base + 18)
        for v in frame.x.ticks()
    ]
    middle = (frame.left + frame.right) / 2
    return join(
        [
            tag("line", class_="base", x1=frame.left, x2=frame.right, y1=base, y2=base),
            *marks,
            tag("text", axis.label, class_="axis middle", x=middle, y=base + 38),
        ]
    )


def left_margin(ticks: Sequence[float], step: float, unit: str) -> float:
    """Room for the labels of the vertical axis."""
    return 16 + CHARACTER * max(len(tick(v, step, unit)) for v in ticks)


Box = tuple[float, float, float, float]


def overlaps(a: Box, b: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) share area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place_label(text: str, x: float, y: float, taken: list[Box], within: Box) -> tuple[float, float] | None:
    """Find room for a label near a point; None if there is none.

    Args:
        text: of the label.
        x: of the point.
        y: of the point.
        taken: boxes that must stay free; the label's is added.
        within: box that the label must not leave.

    Returns:
        Left end of the label's base line.
    """
    width, height = CHARACTER * len(text), 11.0
    for dx, dy in (
        (8, -6), (8, 14), (-8 - width, -6), (-8 - width, 14), (-width / 2, -10), (-width / 2, 19),
        (10, 4), (-10 - width, 4), (16, -14), (-16 - width, -14), (16, 22), (-16 - width, 22),
    ):  # fmt: skip
        box = (x + dx - 1, y + dy - height, x + dx + width + 1, y + dy + 2)
        inside = box[0] >= within[0] and box[1] >= within[1] and box[2] <= within[2] and box[3] <= within[3]
        if inside and not any(overlaps(box, other) for other in taken):
            taken.append(box)
            return x + dx, y + dy
    return None
