"""What each way to place experts and to send tokens costs in rows."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.report.data import TableSection
from moekit.report.parts import Cell, Column, FiniteFloat, Interval, Part, Table


class PlacementRow(Part):
    """One way to place experts and to send tokens, replayed over a trace.

    Attributes:
        devices: how many devices share the experts of a layer.
        routing: such as "plain top-k" or "C2R, T = 8".
        placement: such as "contiguous", "random" or "best".
        sending: such as "once per expert" or "once per device".
        rows: sent per token and layer.
        per_expert: rows of once-per-expert sending under plain top-k, which savings are counted from.
        load: busiest device's load over the mean device's, mean over layers.
        solver: what found the placement.
        gap: how far its value may be from the optimum, as a share; None if not known.
    """

    devices: int
    routing: str
    placement: str
    sending: str
    rows: FiniteFloat | Interval
    per_expert: FiniteFloat
    load: FiniteFloat | None = None
    solver: str = ""
    gap: FiniteFloat | None = None


def placement_section(
    rows: Sequence[PlacementRow], *, title: str = "Rows sent, by placement", lead: str = "", note: str = ""
) -> TableSection:
    """A table for each number of devices.

    Args:
        rows: in the order to show.
        title: heading.
        lead: what to see.
        note: how it was measured.
    """
    counts = list(dict.fromkeys(row.devices for row in rows))
    with_solver = any(row.solver for row in rows)
    return TableSection(
        title=title,
        lead=lead,
        note=note,
        tables=tuple(_table([r for r in rows if r.devices == d], d, with_solver) for d in counts),
    )


def _table(rows: Sequence[PlacementRow], devices: int, with_solver: bool) -> Table:
    columns = [
        Column(name="routing"),
        Column(name="placement"),
        Column(name="a token is sent"),
        Column(name="rows per token"),
        Column(name="against once per expert", unit="%", digits=1, signed=True),
        Column(name="busiest device / mean", digits=2),
    ]
    if with_solver:
        columns += [Column(name="solver"), Column(name="gap to bound", unit="%", digits=2)]
    cells: list[tuple[Cell, ...]] = []
    for r in rows:
        mean = r.rows.mean if isinstance(r.rows, Interval) else r.rows
        row: list[Cell] = [r.routing, r.placement, r.sending, r.rows, mean / r.per_expert - 1, r.load]
        cells.append((*row, r.solver, r.gap) if with_solver else tuple(row))
    return Table(columns=tuple(columns), rows=tuple(cells), caption=f"{devices} devices")
