"""Carry a placement out: reorder experts so that every device owns a contiguous block.

The reordered model computes the same function and is stock: a permutation of experts, router rows, selection biases
and policy lists. Which order it was is kept in the record, so that logical expert numbers can be restored.

Legend: E experts, D devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moekit._progress import Progress, track
from moekit.anatomy.layout import find_expert_tensors
from moekit.anatomy.permute import expert_counts, permute_checkpoint, permute_experts
from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.atomic import atomic_folder
from moekit.checkpoint.expected import verify
from moekit.checkpoint.fingerprint import fingerprint_model
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import read_extra_tensors, seal
from moekit.checkpoint.names import text_config
from moekit.checkpoint.parts import PartEntry
from moekit.checkpoint.record import Expectations, Record
from moekit.checkpoint.shards import ShardWriter
from moekit.checkpoint.small_files import copy_small_files
from moekit.errors import BadConfig, UnsupportedModel
from moekit.placement.plan import Placement
from moekit.runtime.attachment import without_parts
from moekit.runtime.permute import permute_parts
from moekit.runtime.saved import permuted_tensors


def routing_groups(config: Mapping[str, Any] | Any) -> int:
    """Groups of neighbouring experts that a model's routing limits a token to; 1 where it limits nothing.

    Args:
        config: parsed config.json, or a transformers config.
    """
    values = text_config(config if isinstance(config, Mapping) else config.to_dict())
    groups, allowed = values.get("n_group") or 1, values.get("topk_group")
    if values.get("topk_method") == "greedy" or (isinstance(allowed, int) and allowed >= groups):
        return 1
    return int(groups)


def check_groups_whole(order: Sequence[int], groups: int, layer: int) -> None:
    """Refuse an order that tears routing groups apart.

    Args:
        order: new position -> old expert.
        groups: routing groups, blocks of neighbouring experts.
        layer: decoder layer, for the message.

    Raises:
        BadConfig: some group's experts would not be neighbours any more.
    """
    size = len(order) // groups
    for start in range(0, len(order), size):
        homes = {expert // size for expert in order[start : start + size]}
        if len(homes) > 1:
            raise BadConfig(
                f"the placement mixes routing groups {sorted(homes)}: this model first chooses among {groups} "
                f"groups of {size} neighbouring experts, and would choose differently",
                layer=layer,
                expert=order[start],
                hint=f"place again with routing_groups={groups}, which keeps them whole",
            )


def _check(placement: Placement, counts: Mapping[int, int], groups: int, equal: bool) -> None:
    for layer, devices in placement.layers.items():
        if counts.get(layer) != len(devices):
            raise BadConfig(
                f"the placement has {len(devices)} experts here, the model {counts.get(layer, 'no MoE layer')}",
                layer=layer,
                hint="it was made for another model",
            )
        if groups > 1:
            check_groups_whole(placement.order(layer), groups, layer)
        if equal and len(set(placement.sizes(layer))) > 1:
            raise BadConfig(
                f"blocks of {placement.sizes(layer)} experts are not equal, as a stock export needs them",
                layer=layer,
                hint="place with a number of devices that divides the experts; or export with equal=False, "
                "for dispatchers that take uneven blocks",
            )


def apply_placement(model: PreTrainedModel, placement: Placement) -> None:
    """Reorder a live model's experts in place; the tensors of attached parts follow.

    Args:
        model: the model.
        placement: made for it.

    Raises:
        BadConfig: made for another model, or it would tear routing groups apart.
        UnsupportedModel: a router would choose differently after reordering; all layers are as before.
    """
    placement.check_model(fingerprint_model(model))
    counts = {layer.index: layer.geometry.experts for layer in find_moe_layers(model)}
    _check(placement, counts, routing_groups(model.config), equal=False)
    orders = placement.orders()
    with without_parts(model):
        permute_all(model, orders)
    permute_parts(model, orders)


def permute_all(model: nn.Module, orders: Mapping[int, Sequence[int]]) -> None:
    """Reorder all layers or none.

    Raises:
        UnsupportedModel: a router would choose differently.
    """
    done: dict[int, Sequence[int]] = {}
    try:
        for layer, order in orders.items():
            permute_experts(model, {layer: order})
            done[layer] = order
    except UnsupportedModel:
        for layer, order in done.items():
            inverse = sorted(range(len(order)), key=order.__getitem__)
            permute_experts(model, {layer: inverse})
        raise


def _permuted_extra(
    parts: Sequence[PartEntry], tensors: Mapping[str, torch.Tensor], orders: Mapping[int, Sequence[int]], path: Path
) -> dict[str, torch.Tensor]:
    moved = permuted_tensors(parts, tensors, orders)
    for key in tensors.keys() - moved.keys():
        raise BadConfig(
            f"how the extra tensor {key!r} follows reordered experts is not known",
            file=path,
            hint="place the parent checkpoint, before this change",
        )
    return moved


def place_checkpoint(
    source: str | Path | Checkpoint,
    placement: Placement,
    target: str | Path,
    *,
    equal: bool = True,
    overwrite: bool = False,
    command: str = "moekit.placement.place_checkpoint",
    progress: Progress | None = None,
) -> Record:
    """Write a stock checkpoint whose experts lie in the placement's order: equal logits, contiguous device blocks.

    Streams one tensor at a time. Parts in the source's record are carried along, their tensors reordered.

    Args:
        source: folder, hub id or opened checkpoint.
        placement: made for it.
        target: folder to write, whole or not at all.
        equal: demand blocks of one size, which stock expert parallelism cuts the experts into.
        overwrite: replace an existing folder.
        command: how it was made, for the record.
        progress: told once a tensor.

    Returns:
        The record as written; its `config` holds the orders, so that logical expert numbers can be restored.

    Raises:
        BadConfig: made for another model, unequal blocks, routing groups torn apart, or the folder exists.
        BadCheckpoint, UnsafeInput, OutOfBudget: see `Checkpoint.open` and `atomic_folder`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    verify(checkpoint)
    placement.check_model(checkpoint.fingerprint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    layout = find_expert_tensors(shapes, lambda name: checkpoint.where(name)[0])
    counts = expert_counts(shapes, layout)
    _check(placement, counts, routing_groups(checkpoint.config), equal)
    orders = placement.orders()
    parts = checkpoint.record.parts if checkpoint.record is not None else []
    extra = _permuted_extra(parts, read_extra_tensors(checkpoint.path), orders, checkpoint.path)
    record = Record(
        command=command,
        parent=str(source if not isinstance(source, Checkpoint) else checkpoint.path),
        parent_fingerprint=checkpoint.fingerprint,
        seed=placement.seed,
        plan_hash=placement.hash,
        config={"devices": placement.devices, "nodes": placement.nodes, "solver": placement.solver, "orders": orders},
        scores={"objective": placement.objective, "bound": placement.bound},
        parts=parts,
        expectations=Expectations(experts=counts),
    )
    with atomic_folder(target, overwrite=overwrite, need_bytes=checkpoint.nbytes) as temporary:
        copy_small_files(checkpoint.path, temporary)
        stream = permute_checkpoint(checkpoint.stream(), layout, counts, orders)
        with ShardWriter(temporary) as writer:
            for name, tensor in track(stream, "reordering experts", progress, len(shapes)):
                writer.add(name, tensor)
        return seal(temporary, record, extra_tensors=extra, progress=progress)
