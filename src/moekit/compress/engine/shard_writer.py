"""Write a checkpoint whose tensors are all known beforehand: exact sizes, in any order, hashed while the bytes pass.

`OutputShards` takes tensors as they come; here names, dtypes and shapes come first. So headers are tight, the
folder's size is known before the work, and tensors may be written in another order than they lie on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from moekit.checkpoint.experts import stacked_experts
from moekit.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from moekit.checkpoint.record import TensorExpectation
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo
from moekit.checkpoint.shards import index_text
from moekit.errors import BadCheckpoint

_CHUNK = 8 << 20
# One is read while others are hashed.
_BUFFERS = 4


@dataclass(frozen=True)
class Spec:
    """A tensor to come: name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        bits = DTYPE_BITS[self.dtype]
        for size in self.shape:
            bits *= size
        return bits // 8


@dataclass(frozen=True)
class Shard:
    """One file to come.

    Attributes:
        file: its name.
        header: its first bytes, up to the first tensor.
        tensors: in file order; their offsets count from the start of the file.
    """

    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.tensors[-1].offsets[1] if self.tensors else len(self.header)


def lay_out(specs: Iterable[Spec], max_shard_bytes: int) -> tuple[list[Shard], str | None]:
    """Share tensors among shards, in the order given.

    Args:
        specs: all tensors of the checkpoint.
        max_shard_bytes: of one shard's tensors; a larger tensor gets a shard of its own.

    Returns:
        The shards, and the text of the index; None where one shard needs no index.
    """
    groups: list[list[Spec]] = [[]]
    filled = total = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
        total += spec.nbytes
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    shards = [_shard(name, group) for name, group in zip(names if count > 1 else [SINGLE_FILE], groups, strict=True)]
    weight_map = {info.name: shard.file for shard in shards for info in shard.tensors}
    return shards, index_text(weight_map, total) if count > 1 else None


def _shard(file: str, specs: Sequence[Spec]) -> Shard:
    # Wide elements first: every tensor then starts at a multiple of its element size.
    ordered = sorted(specs, key=lambda spec: -DTYPE_BITS[spec.dtype])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = [], 0
    for spec in ordered:
        starts.append(position)
        position += spec.nbytes
        offsets = [starts[-1], position]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = [
        TensorInfo(s.name, file, s.dtype, s.shape, (len(header) + start, len(header) + start + s.nbytes))
        for s, start in zip(ordered, starts, strict=True)
    ]
    return Shard(file, header, tuple(infos))


class _Digests:
    """SHA-256 of a tensor whose bytes pass in order: of the whole, and of each expert where it stacks them."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info
        count = stacked_experts(info)
        self._slice = info.nbytes // count if count and info.nbytes and info.nbytes % count == 0 else 0
        self._whole = hashlib.sha256()
        self._part = hashlib.sha256()
        self._left = self._slice
        self._parts: list[str] = []

    @property
    def stacked(self) -> bool:
        """Whether slices are hashed too."""
        return self._slice > 0

    def whole(self, view: memoryview) -> None:
        """Take bytes for the digest of the whole."""
        self._whole.update(view)

    def parts(self, view: memoryview) -> None:
        """Take bytes for the digests of the slices."""
        while view:
            piece, view = view[: self._left], view[self._left :]
            self._part.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._parts.append(self._part.hexdigest())
                self._part, self._left = hashlib.sha256(), self._slice

    def result(self) -> TensorExpectation:
        """What the record holds of the tensor, once all bytes have passed."""
        return TensorExpectation(
            dtype=self.info.dtype,
            shape=list(self.info.shape),
            sha256=self._whole.hexdigest(),
            experts=self._parts if self.stacked else None,
        )


class OutputShards:
    """Writes the tensors of `lay_out`, in any order; a context manager that closes all files.

    Memory is a few buffers, whatever the tensors' sizes: bytes are read and written plainly, never mapped.

    Args:
        folder: an existing folder.
        shards: from `lay_out`.
        index: from `lay_out`.
        advance: told bytes written.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], index: str | None, advance: Callable[[int], None] | None = None
    ) -> None:
        self._infos = {info.name: info for shard in shards for info in shard.tensors}
        self._advance = advance or (lambda amount: None)
        self._written: dict[str, _Digests] = {}
        self._sources: dict[Path, int] = {}
        self._targets: dict[str, int] = {}
        # One thread each: pieces of a tensor must be hashed in order.
        self._whole, self._parts = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._buffers = [memoryview(bytearray(_CHUNK)) for _ in range(_BUFFERS)]
        self._busy: list[list[Future[None]]] = [[] for _ in range(_BUFFERS)]
        self._next = 0
        for shard in shards:
            self._targets[shard.file] = os.open(folder / shard.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.ftruncate(self._targets[shard.file], shard.nbytes)
            _write(self._targets[shard.file], shard.header, 0)
        if index is not None:
            (folder / INDEX_FILE).write_text(index)

    def copy(self, name: str, source: Path, ranges: Sequence[tuple[int, int]]) -> None:
        """Write a tensor that consists of byte ranges of a file.

        Raises:
            BadCheckpoint: the file ends before a range does.
        """
        file, info = self._source(source), self._infos[name]
        digests = self._written[name] = _Digests(info)
        position = info.offsets[0]
        # An empty tensor has no piece at all.
        pieces = [(at, min(at + _CHUNK, end)) for start, end in ranges for at in range(start, end, _CHUNK)]
        for (start, end), following in itertools.zip_longest(pieces, pieces[1:]):
            if following is not None:
                _announce(file, *following)
            while start < end:
                number, buffer = self._free()
                got = os.preadv(file, [buffer[: end - start]], start)
                if not got:
                    raise BadCheckpoint("the file became shorter while it was read", file=source, hint="fetch it again")
                self._busy[number] = self._pass(digests, buffer[:got], position)
                start += got
                position += got
        self._complete(info, position)

    def announce(self, source: Path, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which bytes the next `copy` will read, so that the system fetches their first ones meanwhile."""
        left = _CHUNK
        for start, end in ranges:
            if left > 0:
                _announce(self._source(source), start, min(end, start + left))
                left -= end - start

    def _source(self, path: Path) -> int:
        if path not in self._sources:
            self._sources[path] = os.open(path, os.O_RDONLY)
        return self._sources[path]

    def put(self, name: str, data: memoryview) -> None:
        """Write a tensor whose bytes are in memory."""
        info = self._infos[name]
        digests = self._written[name] = _Digests(info)
        position = info.offsets[0]
        for start in range(0, len(data), _CHUNK):
            piece = data[start : start + _CHUNK]
            for future in self._pass(digests, piece, position):
                future.result()
            position += len(piece)
        self._complete(info, position)

    def _free(self) -> tuple[int, memoryview]:
        number, self._next = self._next, (self._next + 1) % _BUFFERS
        for future in self._busy[number]:
            future.result()
        return number, self._buffers[number]

    def _pass(self, digests: _Digests, view: memoryview, position: int) -> list[Future[None]]:
        """Hash a piece beside writing it; the piece may be reused once the futures are done."""
        futures = [self._whole.submit(digests.whole, view)]
        if digests.stacked:
            futures.append(self._parts.submit(digests.parts, view))
        _write(self._targets[digests.info.shard], view, position)
        self._advance(len(view))
        return futures

    def _complete(self, info: TensorInfo, position: int) -> None:
        if position != info.offsets[1]:
            raise AssertionError(f"{info.name}: {position - info.offsets[0]} bytes came, not {info.nbytes}")

    def digests(self) -> dict[str, TensorExpectation]:
        """What the record holds of every tensor; all must have been written."""
        missing = sorted(set(self._infos) - set(self._written))
        if missing:
            raise AssertionError(f"{len(missing)} tensors were not written: {missing[:8]}")
        for futures in self._busy:
            for future in futures:
                future.result()
        return {name: self._written[name].result() for name in self._infos}

    def close(self) -> None:
        """Close all files."""
        self._whole.shutdown()
        self._parts.shutdown()
        for file in (*self._targets.values(), *self._sources.values()):
            os.close(file)
        self._targets, self._sources = {}, {}

    def __enter__(self) -> OutputShards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _announce(file: int, start: int, end: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, end - start, os.POSIX_FADV_WILLNEED)


def _write(file: int, data: memoryview | bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, position)
        view, position = view[done:], position + done
