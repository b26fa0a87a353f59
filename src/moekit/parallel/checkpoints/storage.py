"""How torch.distributed.checkpoint writes and reads shards: its storage interface over safetensors files.

Its planners decide who writes what: replicated tensors once, dealt out evenly, and FSDP2's parts each by its rank; and
on load, which boxes of which files a rank needs.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from moekit.errors import BadCheckpoint, BadConfig, OutOfBudget
from moekit.parallel.checkpoints.files import TORCH_DTYPES, Stored, dtype_name, shard_name, write_shard
from moekit.parallel.checkpoints.index import Chunk, Entry, Index, stored_name


class ShardsWriter(StorageWriter):
    """One file a rank.

    Args:
        folder: an existing folder.
        rank: of this process.
        ranks: how many write.

    Attributes:
        tensors: on the coordinator, afterwards: what was written where.
    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.tensors: dict[str, Entry] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to open."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what is no tensor of a type that can be stored."""
        for item in plan.items:
            if item.tensor_data is None:
                raise BadConfig(f"{item.index.fqn!r} is no tensor", hint="give it as `extra`")
            dtype_name(item.tensor_data.properties.dtype, item.index.fqn)
        # Where FSDP2 has fewer rows than ranks, some hold nothing.
        return dataclasses.replace(plan, items=[item for item in plan.items if not _empty_part(item)])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Ask for room for all ranks' files before any is written."""
        needed = sum(_stored(item, lambda: torch.empty(0)).nbytes for plan in plans for item in plan.items)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutOfBudget(
                f"the disk is full: {needed:,} bytes are needed, {free:,} bytes are free",
                file=self.folder.parent,
                hint="free some space or write to another disk; nothing was changed",
            )
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the own file."""
        results = []
        if plan.items:

            def fetch(item: WriteItem) -> Callable[[], Tensor]:
                return lambda: _tensor(planner.resolve_data(item))

            write_shard(
                self.folder / shard_name(self.rank, self.ranks), [_stored(item, fetch(item)) for item in plan.items]
            )
            for item in plan.items:
                data = item.tensor_data
                assert data is not None
                name = shard_name(self.rank, self.ranks)
                chunk = Chunk(shard=name, offset=tuple(data.chunk.offsets), shape=tuple(data.chunk.sizes))
                results.append(WriteResult(item.index, _stored(item, lambda: torch.empty(0)).nbytes, chunk))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Note what lies where."""
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for result in (result for ranked in results for result in ranked):
            chunks[result.index.fqn].append(result.storage_data)
        for key, parts in sorted(chunks.items()):
            told = metadata.state_dict_metadata[key]
            assert isinstance(told, TensorStorageMetadata)
            dtype = dtype_name(told.properties.dtype, key)
            self.tensors[key] = Entry(dtype=dtype, shape=tuple(told.size), chunks=tuple(parts))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


def _empty_part(item: WriteItem) -> bool:
    data = item.tensor_data
    return data is not None and 0 in data.chunk.sizes and 0 not in data.size


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _stored(item: WriteItem, fetch: Callable[[], Tensor]) -> Stored:
    data = item.tensor_data
    assert data is not None
    dtype = dtype_name(data.properties.dtype, item.index.fqn)
    shape = tuple(data.chunk.sizes)
    chunk = Chunk(shard="", offset=tuple(data.chunk.offsets), shape=shape)
    whole = Entry(dtype=dtype, shape=tuple(data.size), chunks=(chunk,))
    return Stored(stored_name(item.index.fqn, whole, chunk), dtype, shape, fetch)


class ShardsReader(StorageReader):
    """Reads the boxes that a rank needs, from memory-mapped files.

    Args:
        folder: of the checkpoint.
        index: read and checked.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as the planner wants it."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=TORCH_DTYPES[entry.dtype]),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in entry.chunks],
                )
                for key, entry in self.index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy boxes into place, file by file."""
        wanted: dict[str, list[tuple[str, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            entry = self.index.tensors[item.storage_index.fqn]
            chunk = _chunk_at(entry, item.storage_index)
            wanted[chunk.shard].append((stored_name(item.storage_index.fqn, entry, chunk), item))
        for shard, items in sorted(wanted.items()):
            try:
                with safe_open(self.folder / shard, framework="pt") as file:
                    for name, item in items:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(_box(file, name, item))
                        planner.commit_tensor(item, target)
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(
                    f"it became unreadable: {error}", file=self.folder / shard, hint="take an earlier checkpoint"
                ) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


def _chunk_at(entry: Entry, index: MetadataIndex) -> Chunk:
    if index.offset is None:
        return entry.chunks[0]
    offset = tuple(index.offset)
    return next(chunk for chunk in entry.chunks if chunk.offset == offset)


def _box(file: Any, name: str, item: ReadItem) -> Tensor:
    if not item.lengths:
        scalar: Tensor = file.get_tensor(name)
        return scalar
    ranges = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
    box: Tensor = file.get_slice(name)[ranges]
    return box
