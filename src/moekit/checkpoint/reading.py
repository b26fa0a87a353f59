"""Read tensors by plain file reads: unlike with mapped files, nothing stays resident but what was asked for."""

from __future__ import annotations

import os
from types import TracebackType

import torch

from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import where
from moekit.checkpoint.safety import TensorInfo
from moekit.errors import BadCheckpoint

_TORCH_DTYPES = {name: getattr(torch, dtype.removeprefix("torch.")) for dtype, name in TORCH_NAMES.items()}
# A read() may return less than asked for above 2 GiB.
_PIECE_BYTES = 1 << 30


class TensorReader:
    """Reads tensors, or ranges of their rows, of one checkpoint; a context manager that closes the shards.

    Args:
        checkpoint: opened, its headers checked.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _file(self, shard: str) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.checkpoint.path / shard, os.O_RDONLY)
        return self._files[shard]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Read a tensor, or some neighbouring rows of its first axis.

        Args:
            name: the tensor.
            rows: first row and the one after the last; None for all.

        Raises:
            BadCheckpoint: no such tensor, a dtype that torch cannot hold, or the shard is shorter than its header says.
        """
        info = self.checkpoint.tensors.get(name)
        if info is None:
            layer, expert = where(name)
            raise BadCheckpoint(f"there is no tensor {name!r}", file=self.checkpoint.path, layer=layer, expert=expert)
        dtype = _TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise self._unreadable(info, f"torch has no dtype {info.dtype}")
        if rows is None:
            tensor = torch.empty(info.shape, dtype=dtype)
            self._fill(tensor, info, info.offsets[0])
            return tensor
        first, last = rows
        tensor = torch.empty((last - first, *info.shape[1:]), dtype=dtype)
        self._fill(tensor, info, info.offsets[0] + first * (info.nbytes // info.shape[0]))
        return tensor

    def _fill(self, tensor: torch.Tensor, info: TensorInfo, offset: int) -> None:
        if not tensor.numel():
            return
        view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            got = os.preadv(self._file(info.shard), [view[done : done + _PIECE_BYTES]], offset + done)
            if got == 0:
                raise self._unreadable(info, "the shard ends before the tensor does")
            done += got

    def _unreadable(self, info: TensorInfo, reason: str) -> BadCheckpoint:
        layer, expert = where(info.name)
        return BadCheckpoint(
            f"tensor {info.name!r} cannot be read: {reason}",
            file=self.checkpoint.path / info.shard,
            layer=layer,
            expert=expert,
            hint="fetch the shard again",
        )
