"""More bits for layers whose block changes what it is given (QuantMoE-Bench, arXiv:2406.08155)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, BitSharer, Room, Shares, WidthErrors, by_layer, ranked_layers


@register(
    name="blocks",
    kind=KIND,
    paper="arXiv:2406.08155",
    needs=("block_cosine",),
    changes="weights",
    limits=("The cosine is measured on the text; the paper's network that predicts it for other texts is left out.",),
)
class Blocks(BitSharer):
    """Layers whose block turns its input furthest get the largest width, the others the smallest.

    1 - cos(x, y), the mean over tokens, x what the block is given and y what it gives; with `of: stream` the residual
    stream before and after the block is compared instead. One width a layer, which engines can hold.
    """

    of: Literal["block", "stream"] = Field(default="block", description="what is compared before and after")

    @classmethod
    def examples(cls) -> Sequence[Blocks]:
        """Both."""
        return [cls(), cls(of="stream")]

    @property
    def required(self) -> tuple[str, ...]:
        """The cosine that is asked for."""
        return ("block_cosine",) if self.of == "block" else ("block_residual_cosine",)

    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """Down the layers by importance, until the bits are given out."""
        worth = [1 - float(own.statistics[self.required[0]]) / max(own.statistics.tokens, 1) for own in seen.values()]
        return by_layer(room, ranked_layers(room, worth, list(seen)))
