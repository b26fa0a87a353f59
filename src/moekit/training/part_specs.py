"""Names of parts of a model, as a run is given them: "router", "experts:20-29", "experts:4[5]", "-router".

Legend: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import BadConfig

PARTS = ("router", "experts", "shared", "attention", "norms", "embeddings", "other", "adapters", "attached")
_SPEC = re.compile(
    r"^(?P<minus>-?)(?P<part>[a-z]+)(?::(?P<first>\d+)(?:-(?P<last>\d+))?)?"
    r"(?:\[(?P<low>\d+)(?:-(?P<high>\d+))?\])?$"
)


@dataclass(frozen=True)
class PartSpec:
    """A part, perhaps of some layers only.

    Attributes:
        part: one of `PARTS`, or "all".
        first: first decoder layer, None for all.
        last: last decoder layer, inclusive.
        without: whether it is taken out of what the other parts name.
        low: first expert, None for all.
        high: last expert, inclusive.
    """

    part: str
    first: int | None = None
    last: int | None = None
    without: bool = False
    low: int | None = None
    high: int | None = None

    @classmethod
    def parse(cls, text: str) -> PartSpec:
        """Read "part", "part:layer" or "part:first-last", with a minus before it or experts in brackets behind it.

        Raises:
            BadConfig: no such part, a range that runs backwards, or single rows of what is no stack of experts.
        """
        match = _SPEC.match(text)
        if match is None or (match["part"] not in PARTS and match["part"] != "all"):
            raise BadConfig(
                f"{text!r} names no part of a model", hint=f"there are: all, {', '.join(PARTS)}; experts:4-7"
            )
        first = None if match["first"] is None else int(match["first"])
        last = first if match["last"] is None else int(match["last"])
        low = None if match["low"] is None else int(match["low"])
        high = low if match["high"] is None else int(match["high"])
        for begin, end in ((first, last), (low, high)):
            if begin is not None and end is not None and end < begin:
                raise BadConfig(f"{text!r} ends before it begins", hint="write experts:FIRST-LAST")
        if low is not None and (match["part"] != "experts" or match["minus"]):
            raise BadConfig(
                f"{text!r}: only experts can be named one by one", hint="write experts:4[5] or experts:4[0-3]"
            )
        return cls(match["part"], first, last, bool(match["minus"]), low, high)

    def holds(self, part: str, layer: int | None) -> bool:
        """Whether a parameter of this part and layer is meant."""
        if self.part not in ("all", part):
            return False
        return self.first is None or (layer is not None and self.last is not None and self.first <= layer <= self.last)


def chosen_rows(
    specs: Sequence[PartSpec], part: str, layer: int | None, experts: int | None, *, attached: bool = False
) -> Tensor | bool:
    """What trains of a parameter: all, nothing, or some experts of a stack [E] (bool).

    Args:
        specs: what is to train.
        part: of the parameter.
        layer: its decoder layer.
        experts: E, where it is a stack of all experts of its layer; elsewhere no single ones can train.
        attached: whether it is what a runtime part learns, which "attached" means, too.

    Raises:
        BadConfig: an expert beyond the stack.
    """
    holding = [s for s in specs if s.holds(part, layer) or (attached and s.holds("attached", layer))]
    if not holding or any(spec.without for spec in holding):
        return False
    if any(spec.low is None for spec in holding):
        return True
    if experts is None:
        return False
    rows_E = torch.zeros(experts, dtype=torch.bool)
    for spec in holding:
        assert spec.low is not None
        assert spec.high is not None
        if spec.high >= experts:
            raise BadConfig(f"there is no expert {spec.high}", layer=layer, hint=f"the last one is {experts - 1}")
        rows_E[spec.low : spec.high + 1] = True
    return True if bool(rows_E.all()) else rows_E
