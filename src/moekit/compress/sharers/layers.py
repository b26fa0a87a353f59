"""More bits for the first layers (QuantMoE-Bench, arXiv:2406.08155)."""

from __future__ import annotations

from collections.abc import Mapping

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, BitSharer, Room, Shares, WidthErrors, by_layer, ranked_layers


@register(name="layers", kind=KIND, paper="arXiv:2406.08155", changes="weights")
class Layers(BitSharer):
    """All experts of the first layers get the largest width, those of the others the smallest; needs no text.

    The layer in between gets what is left. One width a layer, which engines can hold.
    """

    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """Layer after layer, from the first, until the bits are given out."""
        return by_layer(room, ranked_layers(room, [-n for n in range(len(seen))], list(seen)))
