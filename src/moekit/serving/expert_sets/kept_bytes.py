"""The bytes of a smaller model, read from the larger one's shards tensor by tensor as transformers asks for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch

from moekit._progress import Progress
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.compress.engine.kept import KeptTensor
from moekit.compress.engine.layout import OutputLayout
from moekit.errors import BadCheckpoint

_DTYPES = {short: getattr(torch, name.removeprefix("torch.")) for name, short in TORCH_NAMES.items()}
# A read() may return less than asked for above 2 GiB.
_PIECE_BYTES = 1 << 30


class KeptBytes:
    """Reads what stays of a checkpoint, tensor by tensor, in any order and by any thread; a context manager.

    Args:
        work: what stays.
        progress: told bytes read.

    Attributes:
        nbytes: read so far.
    """

    def __init__(self, work: OutputLayout, progress: Progress | None = None) -> None:
        self._work = work
        self._progress = progress
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def __enter__(self) -> KeptBytes:
        folder = self._work.checkpoint.path
        for shard in sorted({kept.source.shard for kept in self._work.kept}):
            self._files[shard] = os.open(folder / shard, os.O_RDONLY)
        if self._progress is not None:
            self._progress.start("loading", sum(kept.spec.nbytes for kept in self._work.kept))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if self._progress is not None:
            self._progress.finish()

    def tensors(self) -> dict[str, Any]:
        """Names of the smaller model's tensors -> stand-ins, which are read when they are asked for."""
        return {kept.name: _Waiting(self, kept) for kept in self._work.kept}

    def read(self, kept: KeptTensor) -> torch.Tensor:
        """Read what stays of one tensor.

        Raises:
            BadCheckpoint: a dtype that torch cannot hold, or the shard ends too early.
        """
        dtype = _DTYPES.get(kept.source.dtype)
        if dtype is None:
            raise self._unreadable(kept, f"torch has no dtype {kept.source.dtype}")
        if kept.scattered:
            data = torch.frombuffer(bytearray(kept.gather(self._work.checkpoint)), dtype=torch.uint8)
        else:
            data = torch.empty(kept.spec.nbytes, dtype=torch.uint8)
            self._fill(kept, data.numpy().data)
        with self._lock:
            self.nbytes += kept.source.nbytes if kept.scattered else len(data)
            if self._progress is not None:
                self._progress.advance(len(data))
        return data.view(dtype).reshape(kept.shape)

    def _fill(self, kept: KeptTensor, view: memoryview) -> None:
        file, at = self._files[kept.source.shard], 0
        for start, end in _joined(kept.ranges()):
            while start < end:
                got = os.preadv(file, [view[at : at + min(end - start, _PIECE_BYTES)]], start)
                if not got:
                    raise self._unreadable(kept, "the shard ends before the tensor does")
                start, at = start + got, at + got

    def _unreadable(self, kept: KeptTensor, reason: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"tensor {kept.source.name!r} cannot be read: {reason}",
            file=self._work.checkpoint.path / kept.source.shard,
            layer=kept.layer,
            hint="fetch the shard again",
        )


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


class _Waiting:
    """Stands for a tensor as safetensors' slices do: what transformers asks of those, it can ask of this."""

    def __init__(self, source: KeptBytes, kept: KeptTensor) -> None:
        self._source = source
        self._kept = kept

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._source.read(self._kept)[index]

    def get_shape(self) -> list[int]:
        """Sizes, as a slice tells them."""
        return list(self._kept.shape)

    def get_dtype(self) -> str:
        """Safetensors' name of the dtype, as a slice tells it."""
        return self._kept.source.dtype

    @property
    def shape(self) -> torch.Size:
        """Sizes, as a tensor tells them."""
        return torch.Size(self._kept.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, as a tensor tells it."""
        return _DTYPES.get(self._kept.source.dtype)

    def is_floating_point(self) -> bool:
        """Whether it holds no integers: where a config names no dtype, that of the first such tensor counts."""
        return self.dtype is not None and self.dtype.is_floating_point
