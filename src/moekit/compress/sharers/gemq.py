"""GEMQ: one budget for all experts of all layers, by what each adds to the loss (ICML 2026, arXiv:2605.23078).

Legend: E experts, C widths, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, CostSharer, Measures, Room, WidthErrors
from moekit.errors import BadConfig

# Bits between the means of two rounds.
_STEP = 0.5


@register(
    name="gemq",
    kind=KIND,
    paper="arXiv:2605.23078",
    needs=("load",),
    changes="weights",
    limits=(
        "Needs the whole model in memory, and one way back from the loss; gradients of all layers lie on disk.",
        "Routers are tuned afterwards, by `moekit heal`, and not between rounds as in the paper.",
        "Each further round rounds the model anew, and takes its gradients and errors once more.",
    ),
)
class Gemq(CostSharer):
    """Over the whole model the share of least sum of g^2 Delta^2, with no floor for any layer.

    Delta is the change of the output of the layer's experts when one of them alone is rounded to a width, g the
    gradient of the loss there; the products of squares are summed over tokens and channels: the diagonal of the
    empirical Fisher information in place of the Hessian. How often an expert is chosen, and how strongly, is in Delta.
    `spread` is the rule that the paper's tables were made under. With several `rounds` the mean comes down step by
    step: g, and what experts are given, are those of the model as the round before rounded it, while Delta is still the
    distance from the expert as it was, so that any width may be taken again. Choose it where the model fits in memory.
    """

    measures: ClassVar[Measures] = "loss"

    rounds: int = Field(default=1, ge=1, description="times that costs are measured and bits are shared")
    start: float | None = Field(
        default=None,
        ge=1,
        le=8,
        description="mean of the first round; none: half a bit above the next round's, at most the largest width",
    )

    @classmethod
    def examples(cls) -> Sequence[Gemq]:
        """Without and with the rule."""
        return [cls(), cls(spread=True, rounding="nearest"), cls(rounds=3)]

    def means(self, mean: float, choices: Sequence[int]) -> tuple[float, ...]:
        """Down from the first round's mean to the one that is asked for, in equal steps.

        Raises:
            BadConfig: the first round's mean lies below the last one's, or above the largest width.
        """
        steps = self.rounds - 1
        first = min(choices[-1], mean + _STEP * steps) if self.start is None else self.start
        if not mean <= first <= choices[-1]:
            raise BadConfig(
                f"rounds would begin at a mean of {first:g} bits", hint=f"start at {mean:g} to {choices[-1]}"
            )
        if not steps:
            return (mean,)
        return (*(first + (mean - first) * n / steps for n in range(steps)), mean)

    def costs(self, seen: LayerInputs, errors: WidthErrors, room: Room) -> Tensor:
        """What was measured."""
        return errors.squared_EC
