"""Shards on disk: safetensors files, written and read one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moekit._files import open_own
from moekit.checkpoint.atomic import is_disk_full
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.header import DTYPE_BITS
from moekit.errors import BadConfig, OutOfBudget
from moekit.parallel.checkpoints.index import Chunk, Entry, Index, stored_name

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype[6:]) for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: what the header says, and where the bytes come from when their turn has come."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BITS[self.dtype] // 8


def shard_name(rank: int, ranks: int) -> str:
    """File of one rank."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def dtype_name(dtype: torch.dtype, key: str) -> str:
    """A dtype as safetensors calls it.

    Raises:
        BadConfig: it has no name for it.
    """
    name = TORCH_NAMES.get(str(dtype))
    if name is None:
        raise BadConfig(f"{key!r} has dtype {dtype}, which safetensors cannot hold", hint="convert it first")
    return name


def write_shard(path: Path, tensors: Sequence[Stored]) -> int:
    """Write a safetensors file, one tensor in memory at a time, and flush it to disk.

    Returns:
        Its bytes.

    Raises:
        OutOfBudget: the disk is full.
    """
    # Wide elements first: then every tensor starts at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with os.fdopen(open_own(path), "wb") as file:
            file.truncate()
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in ordered:
                file.write(_bytes(tensor.fetch()))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OutOfBudget(
            f"the disk is full: {position:,} bytes are needed, {free:,} bytes are free ({error.strerror})",
            file=path.name,
            hint="free some space or write to another disk; nothing was changed",
        ) from error
    return 8 + len(text) + position


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_whole(folder: Path, index: Index, key: str) -> Tensor:
    """One tensor, put together from its boxes."""
    entry = index.tensors[key]
    whole = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    for chunk in entry.chunks:
        part = whole
        for dim, (start, size) in enumerate(zip(chunk.offset, chunk.shape, strict=True)):
            part = part.narrow(dim, start, size)
        part.copy_(read_chunk(folder, key, entry, chunk))
    return whole


def read_chunk(folder: Path, key: str, entry: Entry, chunk: Chunk) -> Tensor:
    """One box of a tensor."""
    with safe_open(folder / chunk.shard, framework="pt") as file:
        tensor: Tensor = file.get_tensor(stored_name(key, entry, chunk))
    return tensor
