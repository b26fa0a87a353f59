"""Rewrite a sharded checkpoint: for another number of ranks, or as one plain Hugging Face folder.

Any number of ranks opens any sharded checkpoint; rewritten for as many as will open it, each finds what it needs in one
file. Both ways stream: memory holds one tensor, or for the plain folder the experts of one layer twice.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from moekit._progress import Progress, track
from moekit.checkpoint import Checkpoint, Record, ShardWriter, atomic_folder
from moekit.checkpoint.carried import carried, write_carried
from moekit.checkpoint.conversions import follow_names
from moekit.checkpoint.fingerprint import untied_state_dict
from moekit.checkpoint.folder import CONFIG_FILE
from moekit.checkpoint.meta import meta_model
from moekit.checkpoint.model import read_extra_tensors, seal
from moekit.checkpoint.names import where as layer_and_expert
from moekit.checkpoint.record import RECORD_FILE, TENSORS_FILE
from moekit.checkpoint.safety import TensorInfo, check_name, read_json, refuse_remote_code
from moekit.checkpoint.shards import DEFAULT_SHARD_BYTES
from moekit.errors import BadConfig
from moekit.parallel.checkpoints.files import Stored, read_chunk, read_whole, shard_name, write_shard
from moekit.parallel.checkpoints.index import INDEX_FILE, WEIGHTS, Chunk, Entry, ExpertsEntry, Index, stored_name
from moekit.parallel.layout import ExpertLayout
from moekit.placement import Placement


@dataclass(frozen=True)
class ReshardSizes:
    """What a sharded checkpoint weighs.

    Attributes:
        ranks: that wrote it.
        experts: of the layer that has most.
        weights: bytes of the model.
        optimizer: bytes of the optimizer's state.
        largest_tensor: bytes.
        largest_layer: bytes of the heaviest decoder layer's weights.
    """

    ranks: int
    experts: int
    weights: int
    optimizer: int
    largest_tensor: int
    largest_layer: int


def sizes(folder: str | Path) -> ReshardSizes:
    """What a sharded checkpoint weighs, from its index.

    Raises:
        BadCheckpoint: see `Index.read`.
    """
    index = Index.read(folder)
    layers: dict[int | None, int] = defaultdict(int)
    for key, entry in index.tensors.items():
        if key.startswith(f"{WEIGHTS}/"):
            layers[layer_and_expert(key)[0]] += entry.nbytes
    weights = sum(layers.values())
    total = sum(entry.nbytes for entry in index.tensors.values())
    return ReshardSizes(
        ranks=index.ranks,
        experts=max((entry.count for entry in index.experts.values()), default=0),
        weights=weights,
        optimizer=total - weights,
        largest_tensor=max(entry.nbytes for entry in index.tensors.values()),
        largest_layer=max(layers.values()),
    )


def reshard(
    folder: str | Path,
    out: str | Path,
    *,
    ranks: int,
    placement: Placement | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Index:
    """Rewrite a sharded checkpoint so that each of `ranks` ranks finds its experts in one file.

    Args:
        folder: sharded checkpoint.
        out: target.
        ranks: that will open it.
        placement: rank of every expert; contiguous blocks by default, as `expert_parallel` deals them out.
        overwrite: replace a folder that is there.
        progress: told about files.

    Returns:
        The new index.

    Raises:
        BadCheckpoint: the checkpoint is incomplete.
        BadConfig: fewer experts than ranks; a placement for another number of ranks, or another model.
        OutOfBudget: not enough disk.
    """
    folder = Path(folder)
    index = Index.read(folder)
    owners = {name: _layout(entry, ranks, placement).rank_E.tolist() for name, entry in index.experts.items()}
    parts = _deal(index, owners, ranks)
    total = sum(entry.nbytes for entry in index.tensors.values())
    with atomic_folder(out, overwrite=overwrite, need_bytes=total) as temporary:
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        shards: dict[str, int] = {}
        for rank, boxes in track(enumerate(parts), "writing files", progress, ranks):
            if not boxes:
                continue
            name = shard_name(rank, ranks)
            shards[name] = write_shard(temporary / name, [_stored(folder, index, *box) for box in boxes])
            for key, chunk in boxes:
                chunks[key].append(chunk.model_copy(update={"shard": name}))
        tensors = {key: entry.model_copy(update={"chunks": tuple(chunks[key])}) for key, entry in index.tensors.items()}
        new = index.model_copy(update={"ranks": ranks, "shards": shards, "tensors": tensors})
        for name in (*index.files, RECORD_FILE, TENSORS_FILE):
            _copy(folder, name, temporary)
        new.write(temporary)
    return new


def _layout(entry: ExpertsEntry, ranks: int, placement: Placement | None) -> ExpertLayout:
    if placement is None:
        return ExpertLayout.contiguous(entry.count, ranks)
    placed = placement.layers.get(entry.layer)
    if placement.devices != ranks or placed is None or len(placed) != entry.count:
        raise BadConfig(
            f"the placement is for {placement.devices} devices and {len(placed or ())} experts in this layer, "
            f"not for {ranks} ranks and {entry.count} experts",
            layer=entry.layer,
            hint="place again, for this model and number of ranks",
        )
    return ExpertLayout.make(placed, ranks)


def _deal(index: Index, owners: dict[str, list[int]], ranks: int) -> list[list[tuple[str, Chunk]]]:
    """Boxes of each rank: experts to their owners, everything else to who has least."""
    parts: list[list[tuple[str, Chunk]]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    dense: list[tuple[int, str, Chunk]] = []
    for key, entry in index.tensors.items():
        expert = index.expert_of(key)[1]
        for chunk in entry.chunks:
            nbytes = entry.model_copy(update={"shape": chunk.shape}).nbytes
            if expert is None:
                dense.append((nbytes, key, chunk))
                continue
            path = key.rpartition("/")[2].rsplit(".", 2)[0]
            rank = owners[path][expert]
            parts[rank].append((key, chunk))
            filled[rank] += nbytes
    for nbytes, key, chunk in sorted(dense, key=lambda item: -item[0]):
        rank = filled.index(min(filled))
        parts[rank].append((key, chunk))
        filled[rank] += nbytes
    return parts


def _stored(folder: Path, index: Index, key: str, chunk: Chunk) -> Stored:
    entry = index.tensors[key]
    name = stored_name(key, entry, chunk)
    return Stored(name, entry.dtype, chunk.shape, lambda: read_chunk(folder, key, entry, chunk))


def _copy(folder: Path, name: str, target: Path) -> None:
    source = check_name(folder, name)
    if source.exists() and "/" not in name:
        shutil.copyfile(source, target / name)


def plain(
    folder: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    drop_unknown: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Write a sharded checkpoint's model as one plain folder, which stock `AutoModelForCausalLM` opens.

    Layer by layer: memory holds the heaviest decoder layer about twice. The optimizer's state stays behind. What the
    checkpoint that the model came from holds beyond the model is copied from there.

    Args:
        folder: sharded checkpoint.
        out: target.
        tokenizer: folder to take it from, where the checkpoint has none.
        overwrite: replace a folder that is there.
        max_shard_bytes: of one file.
        drop_unknown: leave out what the source holds beyond the model.
        progress: told about layers and hashing.

    Returns:
        The record as written.

    Raises:
        BadCheckpoint: the checkpoint is incomplete, or has no config; or its source is needed and gone or changed.
        BadConfig: it holds other tensors than its config's model, such as adapters.
        OutOfBudget: not enough disk.
    """
    folder = Path(folder)
    index = Index.read(folder)
    config = read_json(check_name(folder, CONFIG_FILE))
    refuse_remote_code(config, file=folder / CONFIG_FILE)
    groups = _by_layer(index, folder, model := _meta(index, folder, config))
    work = carried(index.source, drop_unknown=drop_unknown)
    if work.source is not None:
        follow_names(model, work.source.tensors)
    need = work.nbytes + sum(entry.nbytes for key, entry in index.tensors.items() if key.startswith(f"{WEIGHTS}/"))
    with atomic_folder(out, overwrite=overwrite, need_bytes=need) as temporary:
        with ShardWriter(temporary, max_shard_bytes) as writer:
            for keys in track(groups, "writing layers", progress):
                state = {name: _assembled(folder, index, name) for name in keys}
                for name, tensor in revert_weight_conversion(model, state).items():
                    writer.add(name, tensor)
        for name in index.files:
            _copy(folder, name, temporary)
        if tokenizer is not None:
            AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(temporary)
        write_carried(work, temporary, model.config, max_shard_bytes=max_shard_bytes)
        record = Record.read(folder) or Record(command="moekit reshard --plain")
        if work.note is not None:
            record = record.model_copy(update={"config": {**record.config, "left_out": work.note}})
        return seal(temporary, record, extra_tensors=read_extra_tensors(folder), progress=progress)


def _meta(index: Index, folder: Path, config: dict[str, Any]) -> Any:
    """The config's model, without memory."""
    infos = {
        key: TensorInfo(key, INDEX_FILE, entry.dtype, entry.shape, (0, entry.nbytes))
        for key, entry in index.tensors.items()
        if key.startswith(f"{WEIGHTS}/")
    }
    return meta_model(Checkpoint(folder, config, infos, None))


def _by_layer(index: Index, folder: Path, model: Any) -> list[list[str]]:
    """Names of the model's tensors in memory, decoder layer by decoder layer, all of them in the checkpoint."""
    expected = untied_state_dict(model)
    whole = _names(index)
    odd = sorted(expected.keys() ^ whole.keys()) or [n for n, shape in whole.items() if expected[n].shape != shape]
    if odd:
        raise BadConfig(
            f"checkpoint and config do not fit, beginning with {odd[0]!r}",
            file=folder,
            layer=layer_and_expert(odd[0])[0],
            hint="a plain folder holds what the config's model has: merge adapters before saving",
        )
    groups: dict[int | None, list[str]] = defaultdict(list)
    for name in expected:
        groups[layer_and_expert(name)[0]].append(name)
    return list(groups.values())


def _names(index: Index) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors as they are in memory, experts stacked."""
    names: dict[str, tuple[int, ...]] = {}
    for key, entry in index.tensors.items():
        kind, _, name = key.partition("/")
        if kind == WEIGHTS and index.expert_of(key)[1] is None:
            names[name] = entry.shape
    for path, experts in index.experts.items():
        for tensor in experts.tensors:
            first: Entry = index.tensors[f"{WEIGHTS}/{path}.0.{tensor}"]
            names[f"{path}.{tensor}"] = (experts.count, *first.shape)
    return names


def _assembled(folder: Path, index: Index, name: str) -> Tensor:
    """A tensor as it is in memory, experts stacked in logical order."""
    path, _, inner = name.rpartition(".")
    experts = index.experts.get(path)
    if experts is None or inner not in experts.tensors:
        return read_whole(folder, index, f"{WEIGHTS}/{name}")
    first = read_whole(folder, index, f"{WEIGHTS}/{path}.0.{inner}")
    stacked = first.new_empty((experts.count, *first.shape))
    for expert in range(experts.count):
        stacked[expert] = read_whole(folder, index, f"{WEIGHTS}/{path}.{expert}.{inner}")
    return stacked
