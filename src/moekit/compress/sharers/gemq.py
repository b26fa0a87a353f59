"""GEMQ: one budget for all experts of all layers, by what each adds to the loss (ICML 2026, arXiv:2605.23078).

Legend: E experts, C widths, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, CostSharer, Measures, Room, WidthErrors


@register(
    name="gemq",
    kind=KIND,
    paper="arXiv:2605.23078",
    needs=("load",),
    changes="weights",
    limits=(
        "Needs the whole model in memory, and one way back from the loss; gradients of all layers lie on disk.",
        "Routers are tuned afterwards, by `moekit heal`; the paper's progressive steps are left out.",
    ),
)
class Gemq(CostSharer):
    """Over the whole model the share of least sum of g^2 Delta^2, with no floor for any layer.

    Delta is the change of the output of the layer's experts when one of them alone is rounded to a width, g the
    gradient of the loss there; the products of squares are summed over tokens and channels: the diagonal of the
    empirical Fisher information in place of the Hessian. How often an expert is chosen, and how strongly, is in Delta.
    `spread` is the rule that the paper's tables were made under. Choose it where the model fits in memory.
    """

    measures: ClassVar[Measures] = "loss"

    @classmethod
    def examples(cls) -> Sequence[Gemq]:
        """Without and with the rule."""
        return [cls(), cls(spread=True, rounding="nearest")]

    def costs(self, seen: LayerInputs, errors: WidthErrors, room: Room) -> Tensor:
        """What was measured."""
        return errors.squared_EC
