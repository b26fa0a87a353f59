"""More bits for experts that are used more (QuantMoE-Bench, arXiv:2406.08155)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.budget.bits import Unit
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, RankedSharer


@register(
    name="frequency",
    kind=KIND,
    paper="arXiv:2406.08155",
    needs=("load",),
    changes="weights",
    limits=("Tells experts of a layer apart, not layers: one width a layer (--unit layer) is refused.",),
)
class Frequency(RankedSharer):
    """The experts that most tokens choose get the largest width, the others the smallest.

    With `scope: model`, the experts that take the largest share of their layer's choices, over all layers. Choose it
    where routing is uneven and a pass of the text is all that may be spent.
    """

    units: ClassVar[tuple[Unit, ...]] = ("expert",)

    @classmethod
    def examples(cls) -> Sequence[Frequency]:
        """Both budgets."""
        return [cls(), cls(scope="model")]

    def worth(self, seen: LayerInputs) -> Tensor:
        """Share of the layer's choices."""
        load_E = seen.finite("load").double()
        return load_E / load_E.sum().clamp_min(1)
