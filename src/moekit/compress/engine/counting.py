"""Which axes count experts, told by the same model with other numbers of them.

An axis that counts experts grows by the same for each: `each` entries an expert, and behind all of them a `tail` that
belongs to none (a router's row for a shared expert, or for skipping).

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Counted:
    """An axis that counts experts.

    Attributes:
        axis: which one.
        each: entries of every expert, which lie together.
        tail: entries behind them.
    """

    axis: int
    each: int
    tail: int


def counted_axes(fewer: Shapes, more: Shapes, experts: tuple[int, int]) -> dict[str, Counted]:
    """The tensors that count experts, and how.

    Args:
        fewer: shapes of one model, by name.
        more: of the same with more experts.
        experts: E of both.
    """
    low, high = experts
    found = {}
    for name, shape in fewer.items():
        for axis, (size, other) in enumerate(zip(shape, more.get(name, shape), strict=True)):
            each, rest = divmod(other - size, high - low)
            tail = size - low * each
            if size != other and not rest and tail >= 0:
                found[name] = Counted(axis, each, tail)
                break
    return found
