"""What routers did, from co-activation counts and loads.

Legend: E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moekit.errors import BadData
from moekit.report.data import BarsSection, HeatmapsSection, LinesSection
from moekit.report.markup import number
from moekit.report.parts import Axis, BarGroup, BarSeries, HeatmapPanel, LineChart, Matrix, Point, Reference, Series

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Coactivations:
    """Co-activation of every layer under one routing, in the order to show it.

    Attributes:
        name: such as "plain top-k, as trained".
        counts: layer -> [E, E], symmetric; the diagonal is each expert's load.
        orders: layer -> expert shown at each place; the experts' own order by default.
        blocks: layer -> how many experts each device holds, along the order; none by default.
    """

    name: str
    counts: Mapping[int, ArrayLike]
    orders: Mapping[int, Sequence[int]] | None = None
    blocks: Mapping[int, Sequence[int]] | None = None


def coactivation_section(
    panels: Sequence[Coactivations], *, title: str = "Which experts fire together", lead: str = "", note: str = ""
) -> HeatmapsSection:
    """Heat maps of co-activation, such as before and after.

    A cell is the share of the row expert's tokens that also chose the column expert.

    Args:
        panels: shown beside each other; all with the same layers.
        title: heading.
        lead: what to see.
        note: how it was measured.

    Raises:
        BadData: layers, orders or blocks that do not fit.
    """
    layers = sorted(panels[0].counts)
    for panel in panels:
        if sorted(panel.counts) != layers:
            raise BadData(f"{panel.name!r} has layers {sorted(panel.counts)}, not {layers}")
    return HeatmapsSection(
        title=title,
        lead=lead,
        note=note,
        layers=tuple(f"Layer {layer}" for layer in layers),
        unit="%",
        meaning="of the tokens of expert {row}, also chose {column}",
        down="expert of a token, from the top",
        across="expert that it also chose, from the left",
        panels=tuple(
            HeatmapPanel(name=panel.name, layers=tuple(_matrix(panel, layer) for layer in layers)) for panel in panels
        ),
    )


def _matrix(panel: Coactivations, layer: int) -> Matrix:
    counts_EE = _counts(panel.counts[layer], layer)
    experts = len(counts_EE)
    order = list(panel.orders[layer]) if panel.orders is not None else list(range(experts))
    if sorted(order) != list(range(experts)):
        raise BadData(f"{panel.name!r}: the order is no permutation of {experts} experts", layer=layer)
    blocks = tuple(panel.blocks[layer]) if panel.blocks is not None else ()
    ordered_EE = counts_EE[np.ix_(order, order)]
    caption = f"{number(effective_partners(ordered_EE), 1)} effective partners per expert"
    if blocks:
        caption = f"{number(inside(ordered_EE, blocks), 1, '%')} of pairs on one device; {caption}"
    shares_EE = np.round(conditional(ordered_EE), 6)
    return Matrix(
        values=tuple(map(tuple, shares_EE.tolist())), names=tuple(map(str, order)), blocks=blocks, caption=caption
    )


def _counts(values: ArrayLike, layer: int) -> Array:
    counts_EE = np.asarray(values, dtype=np.float64)
    if counts_EE.ndim != 2 or counts_EE.shape[0] != counts_EE.shape[1]:
        raise BadData(f"co-activation of shape {counts_EE.shape} is not square", layer=layer)
    return counts_EE


def conditional(counts_EE: Array) -> Array:
    """P(column chosen | row chosen); the diagonal is 0, and so are the rows of experts never chosen."""
    load_E = np.diag(counts_EE)
    shares_EE = np.divide(counts_EE, load_E[:, None], out=np.zeros_like(counts_EE), where=load_E[:, None] > 0)
    np.fill_diagonal(shares_EE, 0)
    return shares_EE


def inside(counts_EE: Array, blocks: Sequence[int]) -> float:
    """Share of the pairs i < j that lie within one block."""
    if sum(blocks) != len(counts_EE):
        raise BadData(f"blocks of {tuple(blocks)} do not cover {len(counts_EE)} experts")
    block_E = np.repeat(np.arange(len(blocks)), blocks)
    upper_EE = np.triu(counts_EE, 1)
    return float(upper_EE[block_E[:, None] == block_E[None, :]].sum() / max(upper_EE.sum(), 1e-300))


def effective_partners(counts_EE: Array) -> float:
    """Mean over chosen experts of exp(entropy of their partners)."""
    partners_EE = counts_EE - np.diag(np.diag(counts_EE))
    total_E = partners_EE.sum(1)
    shares_EE = partners_EE[total_E > 0] / total_E[total_E > 0, None]
    if not len(shares_EE):
        return 0.0
    logs_EE = np.log(shares_EE, out=np.zeros_like(shares_EE), where=shares_EE > 0)
    return float(np.exp(-(shares_EE * logs_EE).sum(1)).mean())


def load_section(
    runs: Mapping[str, Mapping[int, ArrayLike]], *, title: str = "Load of the experts", lead: str = "", note: str = ""
) -> BarsSection:
    """Bars of each expert's tokens, relative to an even share, layer by layer.

    Args:
        runs: name of the routing -> layer -> load [E]; all with the same layers and experts.
        title: heading.
        lead: what to see.
        note: how it was measured.

    Raises:
        BadData: the runs differ in layers or experts.
    """
    names = list(runs)
    layers = sorted(runs[names[0]])
    experts = len(np.asarray(runs[names[0]][layers[0]]))
    groups = []
    for layer in layers:
        series, words = [], []
        for name in names:
            load_E = np.asarray(runs[name].get(layer, ()), dtype=np.float64)
            if load_E.shape != (experts,):
                raise BadData(f"{name!r} has loads of shape {load_E.shape}, not {experts} experts", layer=layer)
            relative_E = load_E / load_E.mean() if load_E.any() else load_E
            series.append(BarSeries(name=name, values=tuple(np.round(relative_E, 5).tolist())))
            words.append(_load_words(name, relative_E))
        groups.append(BarGroup(name=f"Layer {layer}", series=tuple(series), caption=" · ".join(words)))
    return BarsSection(
        title=title,
        lead=lead,
        note=note,
        categories=tuple(map(str, range(experts))),
        groups=tuple(groups),
        x="expert",
        y=Axis(label="load / mean load", zero=True),
        reference=Reference(axis="y", value=1.0, label="even load"),
    )


def _load_words(name: str, relative_E: Array) -> str:
    idle = int((relative_E == 0).sum())
    words = f"{name}: busiest {number(float(relative_E.max()), 2)} × mean, CV {number(float(relative_E.std()), 2)}"
    return words + (f", {idle} never chosen" if idle else "")


def by_layer_section(
    charts: Mapping[str, Mapping[str, Mapping[int, float]]],
    *,
    title: str,
    units: Mapping[str, str] | None = None,
    zero: bool = False,
    lead: str = "",
    note: str = "",
) -> LinesSection:
    """Lines of quantities over layers.

    Args:
        charts: quantity -> name of the routing -> layer -> value.
        title: heading.
        units: quantity -> "%" for fractions.
        zero: let the axes begin at zero.
        lead: what to see.
        note: how it was measured.
    """
    drawn = tuple(
        LineChart(
            title=quantity,
            x=Axis(label="layer"),
            y=Axis(label=quantity, unit=(units or {}).get(quantity, ""), zero=zero),
            series=tuple(
                Series(
                    name=name,
                    markers=False,
                    points=tuple(
                        Point(x=layer, y=value) for layer, value in sorted(values.items()) if math.isfinite(value)
                    ),
                )
                for name, values in runs.items()
            ),
        )
        for quantity, runs in charts.items()
    )
    return LinesSection(title=title, lead=lead, note=note, charts=drawn)
