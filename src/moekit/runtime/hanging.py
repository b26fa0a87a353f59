"""How parts hang in a live model: children, swapped classes, the experts implementation, what stays out of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moekit.anatomy.gate import Gate
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.checkpoint.names import PARTS
from moekit.errors import UnsupportedModel
from moekit.runtime.attention import attention_modules
from moekit.runtime.block import BlockWithParts
from moekit.runtime.experts import IMPLEMENTATION
from moekit.runtime.part import RuntimePart, Slot
from moekit.runtime.router import RouterWithParts
from moekit.runtime.slots import BaseParts, PartOnLayer, SlotParts, parts_on, slot_of, slots_in, subclass_with
from moekit.runtime.tracker import PassTracker

_MIXINS: dict[Slot, type[nn.Module]] = {"router": RouterWithParts, "block": BlockWithParts}


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


def hang(ready: Prepared, part: RuntimePart, tracker: PassTracker, model: nn.Module) -> None:
    """Hang one prepared part on its layer."""
    module = module_of(ready.layer, part.slot)
    if part.slot == "experts":
        _choose_implementation(model, tracker)
    elif slot_of(module) is None:
        module.add_module(PARTS, SlotParts(tracker, ready.gate))
        module.__class__ = subclass_with(_MIXINS[part.slot], type(module))
    slot = slot_of(module)
    assert slot is not None
    slot.add_module(type(part).__name__, ready.on)
    if part.slot != "block":
        let_choose_none(ready.layer.experts, True)


def _choose_implementation(model: nn.Module, tracker: PassTracker) -> None:
    """Let transformers call parts for every layer's experts: the name of an implementation is the whole model's."""
    layers = [layer for layer in find_moe_layers(model) if slot_of(layer.experts) is None]
    if not layers:
        return
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel("experts parts need a whole transformers model")
    before = model.get_experts_implementation()
    for layer in layers:
        name = before if isinstance(before, str) else before.get("", "eager")
        layer.experts.add_module(PARTS, SlotParts(tracker, chosen=name or "eager"))
    model.set_experts_implementation(IMPLEMENTATION)


def let_choose_none(experts: nn.Module, wanted: bool) -> None:
    """Make transformers' grouped kernel skip the index E: without this flag it leaves NaN there.

    Experts that are spread over ranks keep it.
    """
    if hasattr(experts, "_is_expert_parallel") and not hasattr(experts, "experts_in_layer"):
        object.__setattr__(experts, "_is_expert_parallel", wanted)


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
    """Tell `save_pretrained` of every model around which keys are no stock tensors."""
    module: Any
    for module, before in parts.ignored:
        ours = {name for name in module.state_dict() if f"{PARTS}." in name}
        module._keys_to_ignore_on_save = {*(before or ()), *ours}


def strip(model: nn.Module, left: set[Slot]) -> None:
    """Give stock classes back to modules without parts, and the implementation before to experts without any."""
    for module, slot in list(slots_in(model)):
        stock = getattr(type(module), "stock_class", None)
        if stock is not None and not slot.of_layer():
            delattr(module, PARTS)
            module.__class__ = stock
        elif stock is None and "experts" not in left:
            delattr(module, PARTS)
            assert isinstance(model, PreTrainedModel)
            model.set_experts_implementation(slot.chosen)
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
