"""Where parts hang in a live model: one child below each router, experts module or block, and one below the base model.

The module itself stays: its class is replaced by a subclass of the stock class (as torch's `fully_shard` does). So
parameter names, hooks and optimizers see the same module, and detaching gives the stock one back. What a part learns is
registered below it, so that optimizers, DDP, FSDP and peft find it; constants are buffers that are not saved there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moekit.anatomy.probe import Geometry, MoELayer
from moekit.checkpoint.names import PARTS
from moekit.runtime.part import RuntimePart

if TYPE_CHECKING:
    from moekit.anatomy.gate import Gate
    from moekit.runtime.experts import TransientPart
    from moekit.runtime.tracker import PassTracker


class PartOnLayer(nn.Module):
    """One part on one layer.

    Attributes:
        part: the part.
        layer: decoder layer index.
        geometry: sizes of the layer.
        stored: its constants, as they are saved.
        learned: what the layer learns, None if nothing.
        order: parts attached later have higher numbers.
    """

    def __init__(
        self,
        part: RuntimePart,
        layer: MoELayer,
        stored: dict[str, Tensor],
        learned: nn.Module | None,
        shared: nn.Module | None,
        order: int,
    ) -> None:
        super().__init__()
        self.part = part
        self.layer = layer.index
        self.geometry: Geometry = layer.geometry
        self.order = order
        self.learned = learned
        # In a list: registered here it would stand in the state of every layer.
        self._shared = [shared]
        self._names: list[str] = []
        self.stored: dict[str, Tensor] = {}
        self.set_constants(stored)

    @property
    def shared(self) -> nn.Module | None:
        """What all layers learn together."""
        return self._shared[0]

    def set_constants(self, stored: dict[str, Tensor]) -> None:
        """Take other constants, prepared for the forward pass on the device of the old ones."""
        device = next((getattr(self, f"c_{name}").device for name in self._names), None)
        for name in self._names:
            delattr(self, f"c_{name}")
        self.stored = dict(stored)
        prepared = self.part.prepare(stored, self.geometry)
        self._names = list(prepared)
        for name, tensor in prepared.items():
            self.register_buffer(f"c_{name}", tensor if device is None else tensor.to(device), persistent=False)

    def common(self, tracker: PassTracker | None) -> dict[str, Any]:
        """What the part sees in every pass: see `moekit.runtime.inputs.PartInputs`."""
        return {
            "layer": self.layer,
            "geometry": self.geometry,
            "constants": {name: getattr(self, f"c_{name}") for name in self._names},
            "learned": self.learned,
            "shared": self.shared,
            "tracker": tracker,
        }


class SlotParts(nn.Module):
    """The parts of one router, experts module or block, in the order in which they act.

    Attributes:
        tracker: knows the forward pass under way; None where no part of a record is attached.
        gate: the family's own; of a router, and of experts of which a part asks for it.
        transient: of experts: parts that come and go, in the order in which they came.
        own_forward: of experts: what another library set on the module in place of its class's forward; it stands
            inside of all parts.
    """

    def __init__(
        self,
        tracker: PassTracker | None = None,
        gate: Gate | None = None,
        own_forward: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tracker = tracker
        self.gate = gate
        self.transient: list[TransientPart] = []
        self.own_forward = own_forward

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model takes along: whoever watches this one does not watch the copy."""
        return {**vars(self), "transient": [part for part in self.transient if not part.watches]}

    def of_layer(self) -> list[PartOnLayer]:
        """The parts, in the order in which they act."""
        parts = [child for child in self.children() if isinstance(child, PartOnLayer)]
        return sorted(parts, key=lambda on: (stage_number(on.part), on.order))

    def from_inside(self) -> list[PartOnLayer | TransientPart]:
        """All parts of experts, from the one that is nearest to the family's own to the one that is called first."""
        inside = [part for part in self.transient if not part.watches]
        return [*inside, *self.of_layer(), *(part for part in self.transient if part.watches)]


class BaseParts(nn.Module):
    """What stands once in a model: what layers learn together, and the tracker of forward passes.

    Attributes:
        tracker: knows the forward pass under way.
        ignored: `_keys_to_ignore_on_save` of each model around, before parts were attached.
    """

    def __init__(self, tracker: PassTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.ignored: list[tuple[nn.Module, Any]] = []


def stage_number(part: RuntimePart) -> int:
    """Position of a part's stage among those of its slot."""
    return ("score", "choose", "limit").index(getattr(part, "stage", "score"))


def slot_of(module: nn.Module) -> SlotParts | None:
    """The parts that hang on a module; None without any."""
    found = module._modules.get(PARTS)
    return found if isinstance(found, SlotParts) else None


def parts_on(module: nn.Module | None) -> list[RuntimePart]:
    """Parts attached to a router, an experts module or a block, in the order in which they act."""
    slot = None if module is None else slot_of(module)
    return [] if slot is None else [on.part for on in slot.of_layer()]


def learns(model: nn.Module) -> bool:
    """Whether any attached part has learned state, of a layer or shared."""
    ons = [on for _, slot in slots_in(model) for on in slot.of_layer()]
    return any(on.learned is not None or on.shared is not None for on in ons)


def slots_in(model: nn.Module) -> Iterator[tuple[nn.Module, SlotParts]]:
    """Every module that carries parts, in module order, with its parts."""
    for module in model.modules():
        slot = slot_of(module)
        if slot is not None:
            yield module, slot


def subclass_with(mixin: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a stock class with a mixin in front, made once per pair."""
    known = _MADE.get((mixin, stock))
    if known is None:
        known = _MADE[mixin, stock] = type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {"stock_class": stock})
    return known


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
