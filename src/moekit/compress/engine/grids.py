"""On which grids the experts of a folder lie, as its record tells: whoever packs their weights needs to know.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from moekit._validation import parse
from moekit.compress.engine.outcome import LayerOutcome, Part
from moekit.compress.engine.quantizing import QuantizeMethod
from moekit.errors import BadCheckpoint

KEY = "grids"


class Grids(BaseModel):
    """What was rounded, and how.

    Attributes:
        group: inputs of a row that share a grid; 0 for a whole row.
        symmetric: whether zero is the middle of every grid.
        bits: decoder layer -> part of an expert -> bits of all experts, or of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: int
    symmetric: bool
    bits: dict[int, dict[Part, int | tuple[int, ...]]]

    def of(self, layer: int, part: Part, expert: int) -> int | None:
        """Bits of a matrix; None where it was not rounded."""
        told = self.bits.get(layer, {}).get(part)
        return told[expert] if isinstance(told, tuple) else told

    def kept(self, experts: Mapping[str, Sequence[int]]) -> Grids:
        """The same once experts were dropped.

        Args:
            experts: decoder layer -> the old experts that stay, in the order of the new ones; layers left out stay.
        """
        bits: dict[int, dict[Part, int | tuple[int, ...]]] = {}
        for layer, parts in self.bits.items():
            stay = experts.get(str(layer))
            bits[layer] = {
                part: tuple(told[e] for e in stay) if isinstance(told, tuple) and stay is not None else told
                for part, told in parts.items()
            }
        return self.model_copy(update={"bits": bits})


def grids_told(method: Any, outcomes: Mapping[int, LayerOutcome]) -> dict[str, Any]:
    """What a record's `scores` hold of the grids; empty where nothing is rounded.

    Args:
        method: that decided.
        outcomes: decoder layer -> what becomes of it.
    """
    if not isinstance(method, QuantizeMethod):
        return {}
    bits: dict[int, dict[Part, int | tuple[int, ...]]] = {
        layer: {part: n[0] if len(set(n)) == 1 else n for part, n in outcome.bits.items()}
        for layer, outcome in outcomes.items()
    }
    return {KEY: Grids(group=method.group, symmetric=method.symmetric, bits=bits).model_dump(mode="json")}


def read_grids(scores: Mapping[str, Any], file: Any = None) -> Grids | None:
    """The grids that a record's `scores` tell of; None where they tell of none.

    Raises:
        BadCheckpoint: what they tell is damaged.
    """
    if KEY not in scores:
        return None
    told = scores[KEY] if isinstance(scores[KEY], dict) else {}
    return parse(
        Grids, told, what="record", file=file, hint="round the model again (moekit quantize)", kind=BadCheckpoint
    )
