"""Heat maps whose cells are grouped by colour level, one path each: small, crisp at any size, coloured by style alone.

The first layer is drawn here; the page's script draws the others from the same packed numbers, in the same way. A
value is packed in two characters (4,096 steps up to its layer's maximum), and its level is the square root of its
share of the maximum, so that weak partners still show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from moekit.report.data import HeatmapsSection
from moekit.report.markup import tag
from moekit.report.parts import Matrix

LEVELS = 16
STEPS = 4095
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def maximum(section: HeatmapsSection, layer: int) -> float:
    """Largest value of a layer over all panels: panels share a scale, so that they can be compared."""
    return max(max(max(row) for row in panel.layers[layer].values) for panel in section.panels) or 1.0


def pack(values: Sequence[Sequence[float]], top: float) -> str:
    """Two characters a cell, row by row."""
    steps = (round(v / top * STEPS) for row in values for v in row)
    return "".join(ALPHABET[s >> 6] + ALPHABET[s & 63] for s in steps)


def level(step: int) -> int:
    """Colour level of a packed value; 0 is kept for what is (nearly) nothing."""
    return min(LEVELS - 1, math.floor(math.sqrt(step / STEPS) * LEVELS))


def cells(packed: str, size: int) -> list[str]:
    """Path of each colour level's cells, neighbours in a row joined; level 0 is the background and left out."""
    ways = [""] * LEVELS
    for r in range(size):
        begin, current = 0, -1
        for c in range(size + 1):
            at = 2 * (r * size + c)
            here = -1 if c == size else level(ALPHABET.index(packed[at]) * 64 + ALPHABET.index(packed[at + 1]))
            if here != current:
                if current > 0:
                    ways[current] += f"M{begin} {r}h{c - begin}v1h{begin - c}z"
                begin, current = c, here
    return ways


def outlines(blocks: Sequence[int]) -> str:
    """Path around each block of the diagonal."""
    way, at = "", 0
    for size in blocks:
        way += f"M{at} {at}h{size}v{size}h{-size}z"
        at += size
    return way


def heatmap(matrix: Matrix, top: float, label: str) -> Markup:
    """Draw one matrix."""
    size = len(matrix.values)
    paths = [tag("path", class_=f"h{i}", d=way) for i, way in enumerate(cells(pack(matrix.values, top), size)) if way]
    return tag(
        "svg",
        tag("rect", class_="h0", width=size, height=size),
        tag("g", *paths, class_="cells"),
        tag("path", class_="outline", d=outlines(matrix.blocks)),
        viewBox=f"0 0 {size} {size}",
        role="img",
        aria_label=label,
        tabindex=0,
    )


def payload(section: HeatmapsSection) -> dict[str, Any]:
    """What the page's script needs to draw any layer and to tell a cell's value."""
    tops = [maximum(section, i) for i in range(len(section.layers))]
    return {
        "layers": section.layers,
        "unit": section.unit,
        "meaning": section.meaning,
        "tops": tops,
        "panels": [
            {
                "name": panel.name,
                "layers": [
                    {
                        "size": len(m.values),
                        "cells": pack(m.values, tops[i]),
                        "names": m.names,
                        "outline": outlines(m.blocks),
                        "caption": m.caption,
                    }
                    for i, m in enumerate(panel.layers)
                ],
            }
            for panel in section.panels
        ],
    }
