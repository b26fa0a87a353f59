"""Plain top-k: the reference that every policy is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import Field
from torch import Tensor

from moekit.anatomy.gate import Gate
from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.routing.policy import RoutingPolicy


@register(name="topk", kind="routing", paper="arXiv:1701.06538", changes="routing", stock=True)
class TopK(RoutingPolicy):
    """Each token takes the K experts with the best scores, as the family itself does.

    Selection bias, expert groups, normalisation and scale are the family's own, so that without `top_k` indices and
    weights equal the stock router's bit for bit. Choose it as the baseline of a comparison, or with `top_k` to see
    what fewer or more experts a token would do.
    """

    top_k: int | None = Field(default=None, ge=1, description="experts a token; None keeps the model's own K")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[RoutingPolicy]:
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

    def route(
        self, gate: Gate, logits_TE: Tensor, tensors: Mapping[str, Tensor], hidden_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Plain top-k through the family's gate."""
        if self.top_k is not None:
            gate = Gate(replace(gate.spec, top_k=self.top_k), gate.router)
        return gate(logits_TE)
