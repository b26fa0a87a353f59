"""How parts hang in a live model: children, swapped classes, what stays out of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moekit.anatomy.gate import Gate
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.anatomy.stored import find_storage
from moekit.checkpoint.names import PARTS
from moekit.runtime.attention import attention_modules
from moekit.runtime.block import BlockWithParts
from moekit.runtime.experts import ExpertsWithParts, TransientPart, refuse_other_calls
from moekit.runtime.forwards import change_class, has_foreign_forward, refuse_foreign_forward
from moekit.runtime.part import RuntimePart, Slot
from moekit.runtime.router import RouterWithParts
from moekit.runtime.slots import BaseParts, PartOnLayer, SlotParts, parts_on, slot_of, slots_in, subclass_with
from moekit.runtime.tracker import PassTracker
from moekit.runtime.watching import watch

_MIXINS: dict[Slot, type[nn.Module]] = {"router": RouterWithParts, "experts": ExpertsWithParts, "block": BlockWithParts}


@dataclass
class Prepared:
    """What attaching one layer needs, made before anything is touched."""

    layer: MoELayer
    on: PartOnLayer
    gate: Gate | None = None


def module_of(layer: MoELayer, slot: Slot) -> nn.Module:
    """The module of a layer that a slot's parts hang on."""
    if slot == "router":
        return layer.require_router()
    return layer.experts if slot == "experts" else layer.block


def hang(ready: Prepared, part: RuntimePart, tracker: PassTracker) -> None:
    """Hang one prepared part on its layer."""
    slot = _opened(ready.layer, part.slot)
    slot.tracker = tracker
    slot.gate = ready.gate or slot.gate
    slot.add_module(type(part).__name__, ready.on)
    if part.slot != "block":
        let_choose_none(ready.layer.experts, True)


def _opened(layer: MoELayer, kind: Slot) -> SlotParts:
    """What parts hang on in a layer; made, with the module's class swapped, if there are none yet."""
    module = module_of(layer, kind)
    slot = slot_of(module)
    if slot is None:
        slot = SlotParts()
        if kind == "experts":
            refuse_other_calls(module, layer.index)
            if has_foreign_forward(module):
                slot.own_forward = module.__dict__.pop("forward")
        else:
            refuse_foreign_forward(module, layer.index)
        module.add_module(PARTS, slot)
        change_class(module, subclass_with(_MIXINS[kind], type(module)))
    return slot


def _close_empty(module: nn.Module, slot: SlotParts) -> None:
    """Give a module without parts its stock class back."""
    if slot.of_layer():
        return
    slot.tracker = None
    if slot.transient:
        return
    delattr(module, PARTS)
    change_class(module, type(module).stock_class)  # type: ignore[attr-defined]
    if slot.own_forward is not None:
        module.forward = slot.own_forward


@dataclass(frozen=True, eq=False)
class Laid:
    """A part that was laid on a layer's experts; `remove` takes it off, as with torch's hooks."""

    experts: nn.Module
    part: TransientPart
    handle: RemovableHandle | None = None

    def remove(self) -> None:
        """Take it off, whatever came after it; twice does nothing."""
        if self.handle is not None:
            self.handle.remove()
        slot = slot_of(self.experts)
        if slot is not None and self.part in slot.transient:
            slot.transient.remove(self.part)
            _close_empty(self.experts, slot)


def lay(layer: MoELayer, part: TransientPart) -> Laid:
    """Let a part that comes and goes compute a layer's experts; where it stands, `moekit.runtime.experts` says.

    Raises:
        UnsupportedModel: the family's experts do not follow the contract.
    """
    if layer.seam != "experts":
        return Laid(layer.experts, part, watch(layer, part))
    _opened(layer, "experts").transient.append(part)
    return Laid(layer.experts, part)


def let_choose_none(experts: nn.Module, wanted: bool) -> None:
    """Make transformers' grouped kernel skip the index E: without this flag it leaves NaN there.

    Experts that are spread over ranks keep it: what is no expert of their rank reaches them as such an index.
    """
    if hasattr(experts, "_is_expert_parallel"):
        object.__setattr__(experts, "_is_expert_parallel", wanted or hasattr(experts, "experts_in_layer"))


def base_model(model: nn.Module, layers: Sequence[MoELayer]) -> nn.Module:
    """The innermost model that runs all MoE layers: its forward is the pass."""
    names = [layer.name for layer in layers]
    inside = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and all(path.startswith(f"{name}." if name else "") for path in names)
    ]
    return max(inside, key=lambda pair: len(pair[0]), default=("", model))[1]


def base_parts(model: nn.Module, layers: list[MoELayer]) -> BaseParts:
    """What stands once in the model; made, with its hooks, if nothing is attached yet."""
    base = base_model(model, layers)
    known = base._modules.get(PARTS)
    if isinstance(known, BaseParts):
        return known
    indices = tuple(layer.index for layer in layers)
    tracker = PassTracker(indices, attention_modules(model, {layer.index: layer.name for layer in layers}))
    parts = BaseParts(tracker)
    for slot in ("router", "experts", "block"):
        parts.add_module(slot, nn.Module())
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            parts.ignored.append((module, module._keys_to_ignore_on_save))
    base.add_module(PARTS, parts)
    tracker.install(base)
    return parts


def keep_out_of_shards(model: nn.Module, parts: BaseParts) -> None:
    """Tell `save_pretrained` of every model around which keys are no stock tensors, or left out for a part's."""
    replaced = {id(p) for experts, slot in slots_in(model) for p in _replaced(experts, slot)}
    module: Any
    for module, before in parts.ignored:
        ours = {name for name in module.state_dict() if f"{PARTS}." in name}
        ours |= {name for name, p in module.named_parameters() if id(p) in replaced}
        module._keys_to_ignore_on_save = {*(before or ()), *ours}


def _replaced(experts: nn.Module, slot: SlotParts) -> list[nn.Parameter]:
    """Matrices of experts that a part gives in a checkpoint."""
    storage = find_storage(experts) if any(on.part.leaves_out for on in slot.of_layer()) else None
    if storage is None:
        return []
    return [experts.get_parameter(name) for p in storage.projections if not p.bias for name in p.names]


def strip(model: nn.Module) -> None:
    """Give stock classes back to modules without parts."""
    for module, slot in list(slots_in(model)):
        _close_empty(module, slot)
    for layer in find_moe_layers(model):
        if not parts_on(layer.router) and not parts_on(layer.experts):
            let_choose_none(layer.experts, False)


def base_of(model: nn.Module) -> tuple[nn.Module | None, BaseParts | None]:
    """The base model that parts hang below, and what hangs there; nothing without parts."""
    for module in model.modules():
        found = module._modules.get(PARTS)
        if isinstance(found, BaseParts):
            return module, found
    return None, None
