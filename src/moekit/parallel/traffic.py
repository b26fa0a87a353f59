"""Rows, bytes and seconds of what was really sent, read from the arguments of the collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["rows", "counts"]
Way = Literal["dispatch", "combine"]
Pass = Literal["forward", "backward"]


@dataclass
class Traffic:
    """Counters of one dispatcher on one rank.

    A rank's rows to itself are counted, too: they are copied, not sent. `bytes_*` hold everything, metadata included.

    Attributes:
        rows: (pass, way) -> rows for each rank of the group.
        bytes: (pass, way) -> bytes for each rank of the group, counts not included.
        count_bytes: bytes of counts for each rank.
        collectives: how many were issued.
        seconds: by phase.
    """

    rows: dict[tuple[Pass, Way], list[int]] = field(default_factory=dict)
    bytes: dict[tuple[Pass, Way], list[int]] = field(default_factory=dict)
    count_bytes: list[int] = field(default_factory=list)
    collectives: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def sent(self, direction: Pass, way: Way, rows: Sequence[int], row_bytes: int) -> None:
        """Note one exchange of rows."""
        self.collectives += 1
        _add(self.rows.setdefault((direction, way), []), rows)
        _add(self.bytes.setdefault((direction, way), []), [count * row_bytes for count in rows])

    def counted(self, bytes_R: Sequence[int]) -> None:
        """Note one exchange of counts."""
        self.collectives += 1
        _add(self.count_bytes, bytes_R)

    def spent(self, phase: str, seconds: float) -> None:
        """Note time."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def total_rows(self, direction: Pass = "forward", way: Way = "dispatch", *, without: int | None = None) -> int:
        """Rows of one kind; without those to one rank, such as oneself."""
        return sum(n for rank, n in enumerate(self.rows.get((direction, way), [])) if rank != without)

    def total_bytes(self, *, without: int | None = None) -> int:
        """All bytes, counts included; without those to one rank, such as oneself."""
        lists = [*self.bytes.values(), self.count_bytes]
        return sum(n for values in lists for rank, n in enumerate(values) if rank != without)

    def reset(self) -> None:
        """Begin anew."""
        self.rows.clear()
        self.bytes.clear()
        self.count_bytes.clear()
        self.collectives = 0
        self.seconds.clear()


def _add(sums: list[int], values: Sequence[int]) -> None:
    if not sums:
        sums.extend([0] * len(values))
    for place, value in enumerate(values):
        sums[place] += value
