"""PMQ: bits by how often, how strongly and how sensitively an expert is used (MC, ICLR 2025, arXiv:2410.06270).

Legend: E experts, C widths, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, CostSharer, Measures, Room, Scope, WidthErrors


@register(
    name="pmq",
    kind=KIND,
    paper="arXiv:2410.06270",
    needs=("load", "chosen_score"),
    changes="weights",
    limits=(
        "Each layer has the same mean: layers that matter more get no more (`gemq` lets them compete).",
        "Rounds every expert to every width once, to measure what that does.",
    ),
)
class Pmq(CostSharer):
    """Within each layer the share of least sum of phi^alpha w^beta eps^gamma, at least one expert at each large width.

    phi is the share of tokens that choose the expert, w the mean of the router's score where they do (before weights
    are normalised), eps the Frobenius norm of the change of the block's output when that expert alone is rounded to a
    width. An exact dynamic program; of equal costs the fewest bits, then more for the lower expert: one that no token
    chose costs nothing and gets the fewest. With one width a layer, or `scope: model`, eps is counted relative to the
    layer's output and layers compete. Choose it for few bits an expert, with the paper's `--choices 1,2,3` below 2.5.
    """

    measures: ClassVar[Measures] = "errors"

    alpha: float = Field(default=1.0, ge=0, description="power of the share of tokens")
    beta: float = Field(default=1.0, ge=0, description="power of the router's score")
    gamma: float = Field(default=2.0, gt=0, description="power of the error; the paper tries 1, 1.5 and 2")
    spread: bool = Field(default=True, description="at least one expert of a layer at each of the two largest widths")
    scope: Scope = Field(default="layer", description="budget of each layer by itself, or of the whole model")

    @classmethod
    def examples(cls) -> Sequence[Pmq]:
        """The paper's, one budget for the model, and no rule."""
        return [cls(), cls(scope="model"), cls(scope="model", spread=False, rounding="nearest", gamma=1.0)]

    def costs(self, seen: LayerInputs, errors: WidthErrors, room: Room) -> Tensor:
        """See the class."""
        tokens = max(seen.statistics.tokens, 1)
        often_E = seen.finite("load").double() / tokens
        score_E = seen.finite("chosen_score").double() / tokens
        error_EC = errors.squared_EC.sqrt()
        if self.scope == "model" or room.unit == "layer":
            error_EC = error_EC / max(errors.energy, 1e-300) ** 0.5
        weight_E = often_E.pow(self.alpha) * score_E.pow(self.beta)
        # What no token chose has no error; with powers of zero it must have no weight either.
        return weight_E.where(often_E > 0, 0.0)[:, None] * error_EC.pow(self.gamma)
