"""Numbers as people read them, and markup whose text can't be anything but text."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup, escape

from moekit.report.parts import Cell, Column, Interval

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Make an element; every child and attribute that is not Markup is escaped.

    Args:
        name: of the element.
        children: text or elements.
        attributes: `class_` becomes class, other underscores become dashes; None is left out.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    body = "".join(escape(child) for child in children)
    return Markup(f"<{name}{shown}>{body}</{name}>")


def join(parts: Iterable[Markup]) -> Markup:
    """Put elements after one another."""
    return Markup("").join(parts)


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def number(value: float, digits: int = 3, unit: str = "", signed: bool = False) -> str:
    """Write a number: "%" takes a fraction, "B" takes bytes, "p" a probability that is never shown as zero."""
    if unit == "p":
        least = 10.0**-digits
        return f"<{least:.{digits}f}" if value < least else f"{value:.{digits}f}"
    if unit == "%":
        value *= 100
    prefix = ""
    if unit == "B":
        step = 0 if abs(value) < 1024 else min(4, int(math.log(abs(value), 1024)))
        value /= 1024**step
        prefix = ("", "Ki", "Mi", "Gi", "Ti")[step]
        digits = digits if step else 0
    text = f"{abs(value):,.{digits}f}"
    zero = not any(c in "123456789" for c in text)
    sign = "" if zero else MINUS if value < 0 else "+" if signed else ""
    return f"{sign}{text}" + (f"\N{NO-BREAK SPACE}{prefix}{unit}" if unit else "")


def tick(value: float, step: float, unit: str = "") -> str:
    """Write an axis tick with as many digits as the step between ticks needs."""
    step = step * 100 if unit == "%" else step
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    value = value * 100 if unit == "%" else value
    text = f"{abs(value):,.{digits}f}"
    sign = MINUS if value < 0 and any(c in "123456789" for c in text) else ""
    return f"{sign}{text}" + ("\N{NO-BREAK SPACE}%" if unit == "%" else "")


def cell(value: Cell, column: Column) -> str:
    """Write a table cell as text."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if isinstance(value, Interval):
        unit = f"\N{NO-BREAK SPACE}{column.unit}" if column.unit else ""
        mean, low, high = (
            number(v * (100 if column.unit == "%" else 1), column.digits, "", column.signed)
            for v in (value.mean, value.low, value.high)
        )
        return f"{mean}{unit} [{low}, {high}]"
    if isinstance(value, int):
        return number(value, 0, column.unit, column.signed) if column.unit != "%" else number(value, column.digits, "%")
    return number(value, column.digits, column.unit, column.signed)


def verdict(value: Interval, column: Column) -> str:
    """Whether an interval shows something: "good", "bad" or "open" (it includes zero, or no direction is better)."""
    if column.better is None or value.low <= 0 <= value.high:
        return "open"
    return "good" if (value.mean < 0) == (column.better == "low") else "bad"
