"""More bits for layers whose block changes what it is given (QuantMoE-Bench, arXiv:2406.08155).

Legend: N tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.block_pairs import Compared
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, BitSharer, Room, Shares, WidthErrors, by_layer, ranked_layers
from moekit.compress.maths.cosine_net import fit_cosines
from moekit.errors import BadConfig

# Kept beside a layer's statistics: mean cosine told by a network, its held out error, and their variance.
_TOLD = "told_cosine"


@register(
    name="blocks",
    kind=KIND,
    paper="arXiv:2406.08155",
    needs=("block_cosine",),
    changes="weights",
    limits=("Predicted or measured, the cosine is that of this text: the paper's networks are not kept for others.",),
)
class Blocks(BitSharer):
    """Layers whose block turns its input furthest get the largest width, the others the smallest.

    1 - cos(x, y), the mean over tokens, x what the block is given and y what it gives; with `of: stream` the residual
    stream before and after the block is compared instead. One width a layer, which engines can hold. With `by: network`
    the mean is that of what a small network tells of each x, which the block's true cosines on some tokens have taught;
    what was measured is exact and costs less, so take that unless the paper's predictor itself is asked for.
    """

    of: Compared = Field(default="block", description="what is compared before and after")
    by: Literal["measure", "network"] = Field(
        default="measure", description="the cosine is measured, or told by a network from what the block is given"
    )
    tokens: int = Field(default=1 << 16, ge=20, description="tokens at most that a network learns from")

    @classmethod
    def examples(cls) -> Sequence[Blocks]:
        """Both, and a network."""
        return [cls(), cls(of="stream"), cls(by="network")]

    @property
    def required(self) -> tuple[str, ...]:
        """The cosine that is asked for."""
        return ("block_cosine",) if self.of == "block" else ("block_residual_cosine",)

    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """Down the layers by importance, until the bits are given out."""
        worth = [1 - self._cosine(own) for own in seen.values()]
        return by_layer(room, ranked_layers(room, worth, list(seen)))

    @property
    def looks_at(self) -> tuple[Compared, int] | None:
        """Pairs to teach a network with."""
        return (self.of, self.tokens) if self.by == "network" else None

    def finds(self, given_NH: Tensor, cosine_N: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The mean that a network tells, its error on tokens it has not learned from, and their variance: [3]."""
        fitted = fit_cosines(given_NH, cosine_N, generator)
        told = [fitted.mean(given_NH), fitted.error, fitted.variance]
        return {_TOLD: torch.tensor(told, dtype=torch.float64)}

    def _cosine(self, seen: LayerInputs) -> float:
        """The mean over tokens.

        Raises:
            BadConfig: a network was asked for, and none was taught on a text.
        """
        if self.by == "measure":
            return float(seen.statistics[self.required[0]]) / max(seen.statistics.tokens, 1)
        told = seen.statistics.kept(_TOLD)
        if told is None:
            raise BadConfig("no network was taught here", layer=seen.layer, hint="give text (--data)")
        return float(told[0])
