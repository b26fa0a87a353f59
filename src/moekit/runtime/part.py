"""What a runtime part is.

A part is a frozen pydantic config that says what it decides (`plan`: constants, from statistics of a trace, once),
what it learns (`parameters` per layer, `shared` once a model) and what it does in a forward pass (by its slot: see
`moekit.runtime.router`, `block`, `experts`). It is registered with `@register`, so that a checkpoint can name it.

Legend: E experts, K choices a token, H hidden, I expert width.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moekit.anatomy.probe import Geometry
from moekit.catalogue import Trait
from moekit.errors import BadConfig
from moekit.runtime.axes import permuted

if TYPE_CHECKING:
    from moekit.runtime.slots import PartOnLayer

Slot = Literal["block", "router", "experts"]


@dataclass(frozen=True)
class PlanInputs:
    """What a part may look at when it plans one layer.

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


@dataclass(frozen=True, eq=False)
class LayerInit:
    """What a part may look at when it makes what one layer learns.

    Attributes:
        layer: decoder layer index.
        geometry: sizes of the layer.
        constants: what `plan` decided for it: a start that was estimated from a trace.
        module: the live router, experts or block: a start that was copied from its weights.
        generator: of every random draw.
    """

    layer: int
    geometry: Geometry
    constants: Mapping[str, Tensor]
    module: nn.Module
    generator: torch.Generator


class RuntimePart(BaseModel, ABC):
    """Base of all parts; fields are the method's knobs.

    A part itself keeps nothing between calls. What it must hand on it leaves in the pass, `inputs.context`: to later
    layers by `put` and `get`, to the positions that follow in a generation by `extend` (values of every position) or by
    `keep` and `kept` (one state of each sequence, as a recurrence has).

    Attributes:
        slot: where it lives.
        axes: what the axes of its tensors mean, by the constant's name or the learned state's key (see
            `moekit.runtime.axes`); every tensor must be named, those of `shared` excepted, which know no layer.
        in_shards: whether its constants are weights, which lie in the model's shards and are announced by its config;
            others lie beside them, and the record names the part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slot: ClassVar[Slot]
    axes: ClassVar[Mapping[str, str]] = {}
    in_shards: ClassVar[bool] = False

    @property
    def leaves_out(self) -> bool:
        """Whether a checkpoint leaves out the matrices of the experts it is attached to, as it gives them itself."""
        return False

    def give_back(self, on: PartOnLayer, module: nn.Module) -> None:
        """Write into stock experts the matrices that were left out for this part; see `leaves_out`."""

    @classmethod
    def implied_traits(cls) -> frozenset[Trait]:
        """Learnable, where a class says what is learned."""
        own = cls.parameters is not RuntimePart.parameters or cls.shared is not RuntimePart.shared
        return frozenset({"learnable"} if own else ())

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[Self]:
        """Settings that the generic tests try on a layer of this geometry; the defaults, unless fields are required."""
        return [cls()]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse knobs that are impossible for this layer.

        Raises:
            BadConfig: naming the layer and the nearest legal value.
        """

    def plan(self, inputs: PlanInputs) -> dict[str, Tensor]:
        """Constants of one layer, stored with the plan and in the checkpoint; none by default."""
        return {}

    def prepare(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """Turn stored constants into those that the forward pass reads; as they are by default."""
        return dict(tensors)

    def parameters(self, init: LayerInit) -> nn.Module | None:
        """What one layer learns: parameters and buffers, below the slot's module; nothing by default."""
        return None

    def shared(self, layers: Sequence[LayerInit]) -> nn.Module | None:
        """What all layers learn together, once a model; nothing by default. `layers` are those it is attached to."""
        return None

    def permute(self, tensors: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
        """Constants or learned state for a model whose experts were reordered, `order[new] = old`, by `axes`.

        Raises:
            BadConfig: nothing says what the axes of a tensor mean.
        """
        if unknown := sorted(tensors.keys() - self.axes.keys()):
            raise BadConfig(
                f"nothing says how {type(self).__name__}'s tensor {unknown[0]!r} follows reordered experts",
                hint=f"known are {sorted(self.axes) or 'none'}; the plan is damaged or belongs to another policy",
            )
        return {name: permuted(tensor, self.axes[name], order) for name, tensor in tensors.items()}
