"""Put parts into a live model, and take them out again: whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.anatomy.gate import Gate
from moekit.anatomy.identify import identify_gate
from moekit.anatomy.probe import MoELayer, find_moe_layers, holds_all_experts
from moekit.checkpoint.names import PARTS
from moekit.errors import BadConfig
from moekit.runtime.axes import check_axes
from moekit.runtime.experts import ExpertsPart
from moekit.runtime.hanging import Prepared, base_of, base_parts, hang, keep_out_of_shards, module_of, strip
from moekit.runtime.part import LayerInit, RuntimePart, Slot
from moekit.runtime.router import ChoosePart
from moekit.runtime.slots import PartOnLayer, slot_of, slots_in, stage_number


@dataclass(frozen=True, eq=False)
class Attachment:
    """One part on a model.

    Attributes:
        part: the part.
        layers: decoder layer -> what hangs there.
        shared: what all layers learn together.
    """

    part: RuntimePart
    layers: dict[int, PartOnLayer]
    shared: nn.Module | None = None

    @property
    def constants(self) -> dict[int, dict[str, Tensor]]:
        """Decoder layer -> constants, as they are saved."""
        return {layer: on.stored for layer, on in self.layers.items()}


def attach(
    model: nn.Module,
    part: RuntimePart,
    constants: Mapping[int, Mapping[str, Tensor]] | None = None,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Attachment:
    """Attach a part to MoE layers of a model.

    What it learns is registered below router, experts or block (and, for what layers share, below the base model), and
    kept out of the stock shards that `save_pretrained` writes; `moekit.save` puts it beside them.

    Args:
        model: a MoE.
        part: the part.
        constants: decoder layer -> what its `plan` returned; names the layers where `layers` does not.
        layers: decoder layers; None for those of `constants`, or all.
        seed: of what it learns.

    Raises:
        BadConfig: knobs or tensors that do not fit a layer, no such layer, a part that is there already, or a second
            one that chooses. The model is as before.
        UnsupportedModel: the family does not show what the part's slot needs. The model is as before.
    """
    found = {layer.index: layer for layer in find_moe_layers(model)}
    wanted = list(layers if layers is not None else constants if constants is not None else found)
    for index in wanted:
        if index not in found:
            raise BadConfig("this is no MoE layer", layer=index, hint=f"the MoE layers are {sorted(found)}")
    chosen = [found[index] for index in wanted]
    given = {layer.index: dict((constants or {}).get(layer.index, {})) for layer in chosen}
    for layer in chosen:
        part.check(layer.geometry, layer.index)
        _check_dealt_out(part, layer)
        _refuse_second(part, layer)
        check_axes(given[layer.index], part.axes, layer.geometry, layer.index)
    shared, prepared = _prepare(part, chosen, given, seed, _next_order(model))
    base = base_parts(model, list(found.values()))
    try:
        for ready in prepared:
            hang(ready, part, base.tracker)
        if shared is not None:
            base.get_submodule(part.slot).add_module(type(part).__name__, shared)
        keep_out_of_shards(model, base)
    except BaseException:
        _take_off(model, [ready.on for ready in prepared])
        raise
    return Attachment(part, {ready.layer.index: ready.on for ready in prepared}, shared)


def _check_dealt_out(part: RuntimePart, layer: MoELayer) -> None:
    if isinstance(part, ExpertsPart) and not holds_all_experts(layer.experts):
        part.check_dealt_out(layer.index)


def _refuse_second(part: RuntimePart, layer: MoELayer) -> None:
    slot = slot_of(module_of(layer, part.slot))
    for on in [] if slot is None else slot.of_layer():
        if type(on.part) is type(part):
            what = f"{type(part).__name__} is attached here already"
        elif isinstance(on.part, ChoosePart) and isinstance(part, ChoosePart):
            what = f"{type(on.part).__name__} chooses here already, and one part at most can"
        else:
            continue
        raise BadConfig(what, layer=layer.index, hint="detach it first (moekit.runtime.detach)")


def _prepare(
    part: RuntimePart, layers: list[MoELayer], given: Mapping[int, dict[str, Tensor]], seed: int, order: int
) -> tuple[nn.Module | None, list[Prepared]]:
    generator = torch.Generator().manual_seed(seed)
    modules = {layer.index: module_of(layer, part.slot) for layer in layers}
    inits = [
        LayerInit(layer.index, layer.geometry, given[layer.index], modules[layer.index], generator) for layer in layers
    ]
    shared = part.shared(inits)
    prepared = []
    for layer, init in zip(layers, inits, strict=True):
        learned = part.parameters(init)
        if learned is not None:
            check_axes(learned.state_dict(), part.axes, layer.geometry, layer.index)
        device = next(iter(modules[layer.index].parameters()), torch.empty(0)).device
        try:
            on = PartOnLayer(part, layer, given[layer.index], learned, shared, order)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise BadConfig(
                f"the tensors are not what {type(part).__name__} stores: {reason}",
                layer=layer.index,
                hint="the plan is damaged or belongs to another policy; plan the routing again",
            ) from error
        asks = part.slot == "router" or (isinstance(part, ExpertsPart) and part.asks_gate)
        gate = Gate(identify_gate(layer), layer.gate_home) if asks else None
        prepared.append(Prepared(layer, on if device.type == "meta" else on.to(device), gate))
    if shared is not None and layers:
        shared.to(next(iter(modules[layers[0].index].parameters())).device)
    return shared, prepared


def _next_order(model: nn.Module) -> int:
    return 1 + max((on.order for _, slot in slots_in(model) for on in slot.of_layer()), default=-1)


def attached(model: nn.Module, slot: Slot | None = None) -> list[Attachment]:
    """The parts of a model, by slot and in the order in which they act."""
    groups: dict[tuple[str, int], list[PartOnLayer]] = {}
    for _, held in slots_in(model):
        for on in held.of_layer():
            if slot is None or on.part.slot == slot:
                groups.setdefault((on.part.slot, on.order), []).append(on)
    found = [Attachment(ons[0].part, {on.layer: on for on in ons}, ons[0].shared) for ons in groups.values()]
    slots = ("router", "experts", "block")
    return sorted(
        found,
        key=lambda a: (slots.index(a.part.slot), stage_number(a.part), next(iter(a.layers.values())).order),
    )


def detach(
    model: nn.Module, slot: Slot | None = None, *, only: Callable[[RuntimePart], bool] | None = None
) -> list[Attachment]:
    """Take parts off; without any left the model is the stock one again.

    Args:
        model: the model.
        slot: of these only; None for all slots.
        only: says which of them; None for all.

    Returns:
        What was taken off, with what it has learned.
    """
    taken = [a for a in attached(model, slot) if only is None or only(a.part)]
    _take_off(model, [on for a in taken for on in a.layers.values()])
    return taken


def _take_off(model: nn.Module, ons: list[PartOnLayer]) -> None:
    gone = {id(on) for on in ons}
    for _, slot in list(slots_in(model)):
        for name, child in list(slot.named_children()):
            if id(child) in gone:
                delattr(slot, name)
    rest = [on for _, slot in slots_in(model) for on in slot.of_layer()]
    base, parts = base_of(model)
    if parts is not None:
        still = {id(on.shared) for on in rest}
        for slot_parts in parts.children():
            for name, child in list(slot_parts.named_children()):
                if id(child) not in still:
                    delattr(slot_parts, name)
    strip(model)
    if parts is not None and base is not None:
        if rest:
            keep_out_of_shards(model, parts)
        else:
            parts.tracker.remove()
            delattr(base, PARTS)
            for module, before in parts.ignored:
                module._keys_to_ignore_on_save = before


@contextlib.contextmanager
def without_parts(model: nn.Module) -> Iterator[list[Attachment]]:
    """Take all parts off for a moment; they come back as they are, with what they have learned.

    Raises:
        BadConfig: the experts were dealt out meanwhile, over which a part cannot stand; the others are back.
    """
    taken = attached(model)
    _take_off(model, [on for a in taken for on in a.layers.values()])
    try:
        yield taken
    finally:
        refused: list[BadConfig] = []
        for attachment in taken:
            try:
                reattach(model, attachment)
            except BadConfig as error:
                refused.append(error)
        if refused:
            raise refused[0]


def reattach(model: nn.Module, attachment: Attachment) -> None:
    """Put back what `detach` took off, with what it has learned.

    Raises:
        BadConfig: the experts were dealt out meanwhile, over which the part cannot stand. The model is as before.
    """
    found = {layer.index: layer for layer in find_moe_layers(model)}
    for index in attachment.layers:
        _check_dealt_out(attachment.part, found[index])
    base = base_parts(model, list(found.values()))
    for index, on in attachment.layers.items():
        gate = None
        if attachment.part.slot == "router":
            gate = Gate(identify_gate(found[index]), found[index].gate_home)
        hang(Prepared(found[index], on, gate), attachment.part, base.tracker)
    if attachment.shared is not None:
        base.get_submodule(attachment.part.slot).add_module(type(attachment.part).__name__, attachment.shared)
    keep_out_of_shards(model, base)
