"""What every part sees in a forward pass, whatever its slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.errors import UnsupportedModel

if TYPE_CHECKING:
    from moekit.runtime.context import ForwardContext
    from moekit.runtime.tracker import PassTracker


@dataclass(frozen=True, eq=False, kw_only=True)
class PartInputs:
    """What a part sees of its layer and of the pass.

    Attributes:
        layer: decoder layer index.
        geometry: sizes of the layer.
        constants: from the part's `prepare`, where the layer computes.
        learned: the module from its `parameters`.
        shared: the module from its `shared`.
        tracker: knows the pass under way.
    """

    layer: int
    geometry: Geometry
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    learned: Any = None
    shared: Any = None
    tracker: PassTracker | None = None

    @property
    def context(self) -> ForwardContext:
        """The forward pass around the layer.

        Raises:
            UnsupportedModel: there is none, or reentrant activation checkpointing takes it apart.
        """
        if self.tracker is None:
            raise UnsupportedModel("these inputs belong to no forward pass", layer=self.layer)
        return self.tracker.current(self.layer)
