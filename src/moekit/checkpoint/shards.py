"""Write safetensors shards while tensors stream by, without knowing in advance what will come."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.digest import byte_chunks
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo
from moekit.errors import BadConfig

DEFAULT_SHARD_BYTES = 5_000_000_000
# A shard up to this size is kept in memory and gets a tight header; a larger one streams behind a reserved header.
_BUFFER_BYTES = 64 << 20
_RESERVED_HEADER = 1 << 20


def index_text(weight_map: Mapping[str, str], total: int) -> str:
    """The text of model.safetensors.index.json."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


class ShardWriter:
    """Writes tensors as they come into numbered shards; memory is bounded by the largest tensor and a small buffer.

    Use it as a context manager inside `atomic_folder`: leaving it without an error names the shards and writes the
    index; a single shard becomes model.safetensors.

    Args:
        folder: an existing folder.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES):
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[Path] = []
        self._shard_of: dict[str, int] = {}
        self._total = 0
        self._open_shard()

    def _open_shard(self) -> None:
        self._entries: dict[str, dict[str, object]] = {}
        self._header_bytes = 64
        self._position = 0
        self._data: IO[bytes] = io.BytesIO()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor.

        Raises:
            BadConfig: the name was given before, or the dtype has no safetensors name.
        """
        dtype = TORCH_NAMES.get(str(tensor.dtype))
        if dtype is None:
            raise BadConfig(f"tensor {name!r}: safetensors has no dtype {tensor.dtype}", file=self.folder)
        nbytes = tensor.numel() * tensor.element_size()
        self._enter(name, dtype, tuple(tensor.shape), nbytes, tensor.element_size())
        if nbytes:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._data.write(flat.numpy().data)

    def copy(self, info: TensorInfo, shard: Path) -> None:
        """Append a tensor of another shard, byte for byte, a few megabytes at a time.

        Args:
            info: the tensor, from that shard's checked header.
            shard: the file.

        Raises:
            BadConfig: the name was given before.
            BadCheckpoint: the file ends before the tensor does.
        """
        self._enter(info.name, info.dtype, info.shape, info.nbytes, max(DTYPE_BITS[info.dtype] // 8, 1))
        for chunk in byte_chunks(shard, info.offsets):
            self._data.write(chunk)

    def _enter(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int, element: int) -> None:
        """Note a tensor in the header of the shard that its bytes, which come next, go to."""
        if name in self._shard_of:
            raise BadConfig(f"tensor {name!r} is written twice", file=self.folder)
        entry_bytes = len(json.dumps(name)) + 120 + 24 * len(shape)
        full = self._position + nbytes > self.max_shard_bytes or self._header_bytes + entry_bytes > _RESERVED_HEADER
        # An element must not start at an odd address; holes are illegal, so a new shard begins.
        if self._entries and (full or self._position % element):
            self._close_shard()
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [self._position, self._position + nbytes],
        }
        self._header_bytes += entry_bytes
        self._shard_of[name] = len(self._shards)
        self._make_room(nbytes)
        self._position += nbytes
        self._total += nbytes

    def _make_room(self, nbytes: int) -> None:
        """Turn to a file where memory would hold too much."""
        if isinstance(self._data, io.BytesIO) and self._position + nbytes > _BUFFER_BYTES:
            file = self._path().open("wb")
            file.seek(8 + _RESERVED_HEADER)
            file.write(self._data.getbuffer())
            self._data = file

    def _path(self) -> Path:
        return self.folder / f"shard-{len(self._shards):05d}.partial"

    def _close_shard(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
        if isinstance(self._data, io.BytesIO):
            header += b" " * (-len(header) % 8)
            with self._path().open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.write(self._data.getbuffer())
        else:
            header = header.ljust(_RESERVED_HEADER)  # trailing spaces are legal
            self._data.seek(0)
            self._data.write(len(header).to_bytes(8, "little") + header)
            self._data.close()
        self._shards.append(self._path())
        self._open_shard()

    def close(self) -> None:
        """Close the last shard, name all of them and write the index."""
        if self._entries or not self._shards:
            self._close_shard()
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        names = [SINGLE_FILE] if count == 1 else names
        for path, name in zip(self._shards, names, strict=True):
            path.rename(self.folder / name)
        if count > 1:
            weight_map = {name: names[number] for name, number in self._shard_of.items()}
            atomic_write(self.folder / INDEX_FILE, index_text(weight_map, self._total))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif not isinstance(self._data, io.BytesIO):
            self._data.close()
