"""What a routing policy is.

A policy is a frozen pydantic config with two pure functions: `plan` turns statistics of a trace into the tensors it
needs for one layer (once, stored), and `route` turns router logits into weights and indices (every forward). It is
registered with `@register(kind="routing")` and works on every family, since the family's own scoring, biases, groups
and normalisation reach it as a `Gate`.

Legend: T tokens, H hidden, E experts, K choices a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit.anatomy.gate import Gate
from moekit.anatomy.probe import Geometry
from moekit.errors import BadConfig


@dataclass(frozen=True)
class PlanInputs:
    """What a policy may look at when it plans one layer.

    Attributes:
        layer: decoder layer index.
        geometry: sizes of the layer.
        statistics: by name, those the record declares in `needs` ("coactivation" [E, E], "load" [E], ...).
        devices: device of each expert, where a placement is given.
    """

    layer: int
    geometry: Geometry
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    devices: Sequence[int] | None = None


class RoutingPolicy(BaseModel, ABC):
    """Base of all routing policies; fields are the method's knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[RoutingPolicy]:
        """Settings that the generic tests try on a layer of this geometry; the defaults, unless fields are required."""
        return [cls()]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse knobs that are impossible for this layer.

        Raises:
            BadConfig: naming the layer and the nearest legal value.
        """

    def plan(self, inputs: PlanInputs) -> dict[str, Tensor]:
        """Tensors the policy needs for one layer, to be stored with the plan; none by default."""
        return {}

    def prepare(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """Turn stored tensors into those `route` uses; as they are by default."""
        return dict(tensors)

    def permute(self, tensors: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
        """Tensors for a model whose experts were reordered, `order[new] = old`.

        Raises:
            BadConfig: by default, if there are tensors: only the policy knows what their axes mean.
        """
        if tensors:
            raise BadConfig(
                f"{type(self).__name__} does not say how its tensors follow reordered experts",
                hint="reorder the model first and plan the policy again, or give the policy a `permute`",
            )
        return {}

    @abstractmethod
    def route(
        self, gate: Gate, logits_TE: Tensor, tensors: Mapping[str, Tensor], hidden_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            gate: the family's own gate: `selection`, `choose`, `weigh`.
            logits_TE: router logits.
            tensors: from `prepare`, on the logits' device.
            hidden_TH: what the router saw.

        Returns:
            (weights [T, K], indices [T, K]); index E with weight 0 means "no expert".
        """
