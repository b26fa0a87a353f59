"""Bars of several groups on one frame; the page shows one group at a time."""

from __future__ import annotations

from markupsafe import Markup

from moekit.report.charts.frame import Frame, Scale, left_margin, scale, y_axis
from moekit.report.data import BarsSection
from moekit.report.markup import join, tag
from moekit.report.parts import BarGroup

WIDTH, HEIGHT, TOP, BOTTOM, RIGHT = 960.0, 300.0, 30.0, 48.0, 66.0
COLOURS = 6


def bars(section: BarsSection) -> Markup:
    """Draw all groups; all but the first are hidden. Scales are shared, so that groups can be compared."""
    values = [v for g in section.groups for s in g.series for v in s.values]
    if section.reference is not None:
        values.append(section.reference.value)
    y = scale(values, HEIGHT - BOTTOM, TOP, zero=True)
    left = left_margin(y.ticks(), y.step, section.y.unit)
    frame = Frame(WIDTH, HEIGHT, Scale(0, len(section.categories), left, WIDTH - RIGHT, 1), y)
    groups = [
        tag("g", _group(frame, g), data_group=i, class_=None if i == 0 else "hidden")
        for i, g in enumerate(section.groups)
    ]
    return tag(
        "svg",
        y_axis(frame, section.y),
        *groups,
        _reference(frame, section),
        _categories(frame, section),
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        aria_label=f"{section.title}: {section.y.label} of each {section.x}. The numbers are in the table below.",
        data_left=round(frame.left, 2),
        data_right=round(frame.right, 2),
    )


def _group(frame: Frame, group: BarGroup) -> Markup:
    slot = (frame.right - frame.left) / len(group.series[0].values)
    gap = min(4.0, slot * 0.2)
    width = (slot - gap) / len(group.series)
    parts = []
    for index, series in enumerate(group.series):
        way = ""
        for i, value in enumerate(series.values):
            x = frame.left + i * slot + gap / 2 + index * width
            height = frame.y.start - frame.y(value)
            way += f"M{x:.1f} {frame.y.start:.1f}v{-height:.1f}h{width:.1f}v{height:.1f}z"
        parts.append(tag("path", class_=f"bar f{index % COLOURS}", d=way))
    return join(parts)


def _reference(frame: Frame, section: BarsSection) -> Markup:
    if section.reference is None:
        return Markup("")
    y = frame.y(section.reference.value)
    return join(
        (
            tag("line", class_="reference", x1=frame.left, x2=frame.right, y1=y, y2=y),
            tag("text", section.reference.label, class_="note", x=frame.right + 6, y=y + 4),
        )
    )


def _categories(frame: Frame, section: BarsSection) -> Markup:
    slot = (frame.right - frame.left) / len(section.categories)
    widest = 6.5 * max(len(c) for c in section.categories) + 6
    every = max(1, -int(-widest // slot))
    base = frame.y.start
    labels = [
        tag("text", name, class_="tick middle", x=frame.left + (i + 0.5) * slot, y=base + 18)
        for i, name in enumerate(section.categories)
        if i % every == 0
    ]
    middle = (frame.left + frame.right) / 2
    return join(
        [
            tag("line", class_="base", x1=frame.left, x2=frame.right, y1=base, y2=base),
            *labels,
            tag("text", section.x, class_="axis middle", x=middle, y=base + 38),
        ]
    )
