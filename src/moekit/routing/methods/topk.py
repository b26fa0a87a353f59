"""Plain top-k: the reference that every policy is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.runtime.router import ChoosePart, Routed, RouteInputs, with_top_k


@register(
    name="topk",
    kind="routing",
    paper="arXiv:1701.06538",
    changes="routing",
    stock=False,
    limits=("Stock transformers and vLLM open the folder with the model's own K.",),
)
class TopK(ChoosePart):
    """Each token takes the K experts with the best scores, as the family itself does.

    Selection bias, expert groups, normalisation and scale are the family's own, so that without `top_k` indices and
    weights equal the stock router's bit for bit. Choose it as the baseline of a comparison, or with `top_k` to see
    what fewer or more experts a token would do.
    """

    top_k: int | None = Field(default=None, ge=1, description="experts a token; None keeps the model's own K")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[TopK]:
        """The model's own K, and one expert a token."""
        return [cls(), cls(top_k=1)]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse more choices than experts."""
        if self.top_k is not None and self.top_k > geometry.experts:
            raise BadConfig(
                f"top_k is {self.top_k}, but there are {geometry.experts} experts",
                layer=layer,
                hint=f"choose 1 to {geometry.experts}",
            )

    def choose(self, inputs: RouteInputs) -> Routed:
        """Plain top-k through the family's gate."""
        return Routed(*with_top_k(inputs.gate, self.top_k)(inputs.logits))
