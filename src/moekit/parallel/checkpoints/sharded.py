"""Checkpoints of a model on several ranks, which any number of ranks opens, in any placement.

Each rank writes one safetensors file with what it owns. Experts go by their logical ids, so neither the number of ranks
nor a placement is in the files. torch.distributed.checkpoint plans who writes and reads what; its own file formats are
not used: the default one reads pickles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.provenance import origin_of
from moekit.checkpoint.record import Record
from moekit.errors import BadConfig
from moekit.parallel.checkpoints.beside import write_beside
from moekit.parallel.checkpoints.index import WEIGHTS, Index, refuse_other
from moekit.parallel.checkpoints.pieces import Pieces, Stack, find_stacks, unwrapped, weights
from moekit.parallel.checkpoints.ranks import Peers
from moekit.parallel.checkpoints.states import empty_states, group_settings, optimizer_states, restore_groups
from moekit.parallel.checkpoints.storage import ShardsReader, ShardsWriter
from moekit.parallel.sharding import shards
from moekit.runtime.slots import learns


@dataclass(frozen=True)
class Loaded:
    """What came with a checkpoint.

    Attributes:
        ranks: how many wrote it.
        extra: what the saver gave.
        optimizer: whether it holds an optimizer's state.
    """

    ranks: int
    extra: dict[str, Any]
    optimizer: bool


def save_sharded(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    record: Record | None = None,
    group: dist.ProcessGroup | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model from all ranks at once, each what it owns, whole or not at all.

    All ranks of the group call this, with a folder that all of them see. Nothing appears under its name unless all
    succeeded; if one fails, all raise.

    Args:
        model: experts dealt out by `expert_parallel`, or whole; the rest equal on all ranks, or dealt out by FSDP2.
        folder: target.
        optimizer: its state goes along.
        extra: further state, such as a scheduler's; JSON values, taken from rank 0.
        tokenizer: kept beside it for the plain folder.
        record: how the model was made, kept for the plain folder.
        group: ranks that hold the model; all of them by default, or those that share the experts.
        overwrite: replace a folder that is there, at the very end.

    Raises:
        BadConfig: the folder exists; `extra` is no JSON; no rank owns some expert; runtime parts have learned.
        OutOfBudget: some rank's disk is full; names the rank.
        PeerLost: a rank died or stalled.
    """
    folder, model = Path(folder).absolute(), unwrapped(model)
    if learns(model):
        raise BadConfig(
            "the model has runtime parts that learn, which no checkpoint in pieces keeps",
            file=folder,
            hint="save it whole (moekit.save), or detach them",
        )
    peers = Peers(group if group is not None else default_group(model))
    stacks: dict[str, Stack] = {}
    pieces = Pieces()
    groups: list[dict[str, Any]] | None = None

    def collect() -> set[str]:
        nonlocal groups
        stacks.update(find_stacks(model))
        pieces.tensors |= weights(model, stacks).tensors
        if optimizer is None:
            return set()
        groups = group_settings(model, optimizer)
        found = optimizer_states(model, optimizer, stacks)
        pieces.tensors |= found.tensors
        _check_json(groups, "the optimizer's settings")
        return found.numbers

    _check_json(extra, "extra")
    numbers = set[str]().union(*peers.together("preparing to save", collect))
    with peers.folder(folder, overwrite=overwrite) as temporary:
        peers.together("opening the folder", lambda: _check_seen(temporary))
        writer = ShardsWriter(temporary, peers.rank, peers.size)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        peers.transfer(
            "saving",
            lambda: state_dict_saver.save(
                pieces.tensors,
                storage_writer=writer,
                planner=planner,
                process_group=peers.group,
                no_dist=peers.alone,
            ),
        )

        def describe() -> None:
            files = write_beside(model, tokenizer, record, temporary)
            index = Index(
                ranks=peers.size,
                model_type=_model_type(model),
                experts={name: stack.entry for name, stack in stacks.items()},
                shards={path.name: path.stat().st_size for path in sorted(temporary.glob("*-of-*.safetensors"))},
                tensors=writer.tensors,
                groups=groups,
                numbers=tuple(sorted(numbers)),
                extra=dict(extra or {}),
                files=files,
                source=origin_of(model),
            )
            _check_owned(index)
            index.write(temporary)

        peers.first("describing the checkpoint", describe)


def load_sharded(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    group: dist.ProcessGroup | None = None,
) -> Loaded:
    """Load a sharded checkpoint onto any number of ranks; each reads what it needs.

    Args:
        model: the same model, its experts dealt out in any way, or whole.
        folder: of the checkpoint.
        optimizer: gets its state and settings back.
        group: ranks that load; all of them by default, or those that share the experts.

    Returns:
        What came with it.

    Raises:
        BadCheckpoint: a file is missing or damaged; names file, layer and expert. Nothing has been loaded then.
        BadConfig: the checkpoint is of another model, or has no optimizer.
        PeerLost: a rank died or stalled.
    """
    folder, model = Path(folder).absolute(), unwrapped(model)
    peers = Peers(group if group is not None else default_group(model))
    pieces = Pieces()

    index = Index(ranks=0, shards={}, tensors={})

    def prepare() -> None:
        nonlocal index
        index = Index.read(folder)
        refuse_other(_model_type(model), index, folder)
        stacks = find_stacks(model)
        pieces.tensors |= weights(model, stacks).tensors
        _check_fit(pieces.tensors, stacks, index, folder)
        if optimizer is not None:
            _prepare_optimizer(model, optimizer, stacks, index, folder, pieces)

    peers.together("opening the checkpoint", prepare)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    peers.transfer(
        "loading",
        lambda: state_dict_loader.load(
            pieces.tensors,
            storage_reader=ShardsReader(folder, index),
            planner=planner,
            process_group=peers.group,
            no_dist=peers.alone,
        ),
    )
    for finish in pieces.finish:
        finish()
    return Loaded(index.ranks, index.extra, index.groups is not None)


def default_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Ranks that hold a model between them: those that share its experts, or all."""
    ranks = next((shard.ranks for shard in shards(model)), None)
    return ranks.group if ranks is not None and ranks.copies is None else None


def _model_type(model: nn.Module) -> str | None:
    found = getattr(getattr(model, "config", None), "model_type", None)
    return str(found) if found is not None else None


def _check_seen(temporary: Path) -> None:
    if not temporary.is_dir():
        raise BadConfig(
            "this rank does not see the folder that rank 0 has made",
            file=temporary.parent,
            hint="save to a file system that all nodes share",
        )


def _check_json(value: Any, what: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise BadConfig(
            f"{what} must be plain numbers, text, lists and mappings: {error}", hint="turn tensors into lists"
        ) from error


def _check_owned(index: Index) -> None:
    gap = index.first_gap()
    if gap is not None:
        raise BadConfig(
            "no rank of the group that saves owns it",
            layer=gap[0],
            expert=gap[1],
            hint="save from all ranks that share the experts",
        )


def _check_fit(own: Mapping[str, Tensor], stacks: Mapping[str, Stack], index: Index, folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        BadConfig: naming the first difference.
    """
    hint = "load it into the model it was saved from"
    here = {name: stack.entry for name, stack in stacks.items()}
    for name in sorted(here.keys() | index.experts.keys()):
        if here.get(name) != index.experts.get(name):
            counts = [entry.count if entry else 0 for entry in (index.experts.get(name), here.get(name))]
            raise BadConfig(
                f"the checkpoint has {counts[0]} experts in {name}, the model {counts[1]}, or other tensors in them",
                file=folder,
                layer=(here.get(name) or index.experts[name]).layer,
                hint=hint,
            )
    dense = {key for key in index.tensors if key.startswith(f"{WEIGHTS}/") and index.expert_of(key)[1] is None}
    odd = (own.keys() - index.tensors.keys()) | (dense - own.keys())
    if odd:
        key = min(odd)
        lacks = "the model" if key in index.tensors else "the checkpoint"
        raise BadConfig(f"{lacks} has no {key.partition('/')[2]!r}: it is another model", file=folder, hint=hint)
    for key, tensor in own.items():
        entry = index.tensors[key]
        if tuple(tensor.shape) != entry.shape or TORCH_NAMES.get(str(tensor.dtype)) != entry.dtype:
            layer, expert = index.expert_of(key)
            raise BadConfig(
                f"{key.partition('/')[2]!r} is {entry.dtype} {list(entry.shape)} in the checkpoint, "
                f"{TORCH_NAMES.get(str(tensor.dtype), tensor.dtype)} {list(tensor.shape)} in the model",
                file=folder,
                layer=layer,
                expert=expert,
                hint=hint,
            )


def _prepare_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stacks: dict[str, Stack],
    index: Index,
    folder: Path,
    pieces: Pieces,
) -> None:
    if index.groups is None:
        raise BadConfig(
            "the checkpoint holds no optimizer state", file=folder, hint="load without optimizer= to begin afresh"
        )
    restore_groups(model, optimizer, index.groups)
    states = empty_states(model, optimizer, stacks, index)
    pieces.tensors |= states.tensors
    pieces.finish += states.finish
