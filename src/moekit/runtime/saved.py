"""Parts in a checkpoint's two extra files: from the live state into the record, and back into the model on load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit import catalogue
from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.parts import PartEntry, PartTensor
from moekit.errors import BadCheckpoint, MoekitError
from moekit.runtime.attachment import Attachment, attach, attached, detach
from moekit.runtime.axes import permuted
from moekit.runtime.part import RuntimePart


def entries(model: nn.Module) -> tuple[list[PartEntry], dict[str, Tensor]]:
    """What a model's parts leave in the record and in `moekit.safetensors`, read from the live state.

    Raises:
        BadConfig: a part is not in the catalogue, so that no checkpoint could name it.
    """
    found: list[PartEntry] = []
    for attachment in beside_weights(model):
        record = catalogue.of(type(attachment.part))
        found.append(
            PartEntry(
                name=record.name,
                kind=record.kind,
                config=attachment.part.model_dump(mode="json"),
                layers=sorted(attachment.layers),
                replaces=attachment.part.leaves_out,
            )
        )
    return found, tensors_of_parts(model)


def parts_digest(model: nn.Module) -> str:
    """sha256 of a model's parts and all of their tensors, by which equal ones are known; "" without parts."""
    parts = attached(model)
    if not parts:
        return ""
    told = [f"{type(a.part).__qualname__} {a.part.model_dump_json()} {sorted(a.layers)}" for a in parts]
    digest = hashlib.sha256("\n".join(told).encode())
    tensors = tensors_of_parts(model)
    for number, attachment in enumerate(a for a in parts if a.part.in_shards):
        tensors |= {f"shards.{number}.{name}": tensor for name, tensor in _tensors_of(number, attachment).items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def beside_weights(model: nn.Module) -> list[Attachment]:
    """The parts that a record names: all but those whose constants are weights."""
    return [attachment for attachment in attached(model) if not attachment.part.in_shards]


def tensors_of_parts(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model's parts from the live state, under the names that a checkpoint gives them."""
    tensors: dict[str, Tensor] = {}
    for number, attachment in enumerate(beside_weights(model)):
        tensors |= _tensors_of(number, attachment)
    return tensors


def _tensors_of(number: int, attachment: Attachment) -> dict[str, Tensor]:
    tensors = {}
    for layer, on in attachment.layers.items():
        for name, tensor in on.stored.items():
            tensors[str(PartTensor("constants", number, layer, name))] = _whole(tensor)
        for name, tensor in ({} if on.learned is None else on.learned.state_dict()).items():
            tensors[str(PartTensor("learned", number, layer, name))] = _whole(tensor)
    if attachment.shared is not None:
        for name, tensor in attachment.shared.state_dict().items():
            tensors[str(PartTensor("shared", number, None, name))] = _whole(tensor)
    return tensors


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU, also where ranks hold slices of it (all ranks must call)."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = gather() if gather is not None else tensor
    return whole.detach().cpu().contiguous().clone()


def make_part(entry: PartEntry) -> RuntimePart:
    """The part that an entry names.

    Raises:
        BadConfig: unknown here, or knobs it refuses.
    """
    part: RuntimePart = catalogue.make(entry.kind, entry.name, entry.config)
    return part


def restore(model: nn.Module, found: Sequence[PartEntry], tensors: Mapping[str, Tensor]) -> None:
    """Attach the parts that a record names, with what they have learned; all of them or none.

    Args:
        model: stock, as loaded.
        found: the record's `parts`.
        tensors: of moekit.safetensors; those of nobody's part are left alone.

    Raises:
        BadCheckpoint: a layer of the record is no MoE layer, or tensors are missing or misshapen.
        BadConfig: a part is unknown here.
    """
    layers = {layer.index for layer in find_moe_layers(model)} if found else set()
    named = {key: tensor for text, tensor in tensors.items() if (key := PartTensor.parse(text)) is not None}
    try:
        for number, entry in enumerate(found):
            if missing := sorted(set(entry.layers) - layers):
                raise BadCheckpoint(
                    f"the record has {entry.kind} {entry.name!r} in layers {missing}, but they are no MoE layers",
                    hint="moekit.json belongs to another model: load with parts=False for the stock model",
                )
            own = {key: tensor for key, tensor in named.items() if key.part == number}
            _restore_one(model, entry, own)
    except BaseException:
        detach(model)
        raise


@torch.no_grad()
def give_back(model: nn.Module) -> None:
    """Take all parts off, once those that stand for experts' matrices have written these into the experts."""
    modules = {layer.index: layer.experts for layer in find_moe_layers(model)}
    for attachment in attached(model):
        for layer, on in attachment.layers.items():
            if attachment.part.leaves_out:
                attachment.part.give_back(on, modules[layer])
    detach(model)


def _restore_one(model: nn.Module, entry: PartEntry, own: Mapping[PartTensor, Tensor]) -> None:
    constants: dict[int, dict[str, Tensor]] = {layer: {} for layer in entry.layers}
    learned: dict[int | None, dict[str, Tensor]] = {}
    for key, tensor in own.items():
        if key.layer is not None and key.layer not in constants:
            raise BadCheckpoint(
                f"a tensor {str(key)!r} of {entry.kind} {entry.name!r} belongs to no layer that it is attached to",
                hint="moekit.safetensors belongs to another model: load with parts=False for the stock model",
            )
        if key.role == "constants" and key.layer is not None:
            constants[key.layer][key.name] = tensor
        else:
            learned.setdefault(key.layer, {})[key.name] = tensor
    try:
        attachment = attach(model, make_part(entry), constants)
        for layer, on in attachment.layers.items():
            _fill(on.learned, learned.pop(layer, {}), layer)
        _fill(attachment.shared, learned.pop(None, {}), None)
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, MoekitError):
            raise
        raise BadCheckpoint(
            f"the tensors of {entry.kind} {entry.name!r} do not fit: {error}",
            hint="restore both extra files from a copy, or load with parts=False for the stock model",
        ) from error


def _fill(module: nn.Module | None, state: Mapping[str, Tensor], layer: int | None) -> None:
    wanted: Mapping[str, Any] = {} if module is None else module.state_dict()
    if set(wanted) != set(state):
        odd = sorted(set(wanted) ^ set(state))
        raise BadCheckpoint(
            f"what a part has learned lacks or has too many of {odd[:5]}",
            layer=layer,
            hint="restore both extra files from a copy, or load with parts=False for the stock model",
        )
    if module is not None:
        with torch.no_grad():
            module.load_state_dict(dict(state))


def permuted_tensors(
    found: Sequence[PartEntry], tensors: Mapping[str, Tensor], orders: Mapping[int, Sequence[int]]
) -> dict[str, Tensor]:
    """A checkpoint's extra tensors for reordered experts, `order[new] = old`; those of no part are left out."""
    moved: dict[str, Tensor] = {}
    parts = [make_part(entry) for entry in found]
    for text, tensor in tensors.items():
        key = PartTensor.parse(text)
        if key is None or key.part >= len(parts):
            continue
        axes = parts[key.part].axes.get(key.name, "")
        order = None if key.layer is None else orders.get(key.layer)
        moved[text] = tensor if order is None else permuted(tensor, axes, order)
    return moved
