"""Bytes in a file, in pieces of any size that come and go."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Bytes from which on a piece is mapped into memory.
_MAPPED = 1 << 16


@dataclass(frozen=True)
class Slot:
    """A piece of the file: where it begins, and its bytes."""

    start: int
    nbytes: int


class Spill:
    """A file without a name, which is made when it is needed and gone when the process is.

    Args:
        folder: where; None is the system's temporary folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: int | None = None
        self._end = 0
        self._free: dict[int, list[Slot]] = {}
        # Pieces that lie in memory as they are in the file: what is written there would be seen there.
        self._mapped: dict[Slot, weakref.ref[mmap.mmap]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._end

    def put(self, data: Tensor) -> Slot:
        """Write bytes, uint8 in the processor's memory."""
        if self._file is None:
            self._file, path = tempfile.mkstemp(prefix=".moekit-states-", dir=self._folder)
            os.unlink(path)  # gone by itself, whatever ends the process
        slot = self._slot(data.numel())
        write_at(self._file, data, slot.start)
        return slot

    def get(self, slot: Slot) -> Tensor:
        """Bytes of a slot, uint8, to be written to at will: the file stays as it is.

        Larger pieces are mapped: pages that nobody looks at are not read, and freed memory goes back to the system,
        which the allocator would keep between pieces that stay.
        """
        assert self._file is not None  # something was put
        if slot.nbytes < _MAPPED:
            return read_at(self._file, slot.start, slot.nbytes)
        piece = mmap.mmap(self._file, slot.nbytes, access=mmap.ACCESS_COPY, offset=slot.start)
        self._mapped[slot] = weakref.ref(piece)
        return torch.frombuffer(piece, dtype=torch.uint8)

    def free(self, slot: Slot) -> None:
        """The slot's bytes are not wanted any more; it is given out again when nobody has them in memory either."""
        self._free.setdefault(slot.nbytes, []).append(slot)

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _slot(self, nbytes: int) -> Slot:
        free = self._free.get(nbytes, [])
        for place, slot in enumerate(free):
            piece = self._mapped.get(slot)
            if piece is None or piece() is None:
                self._mapped.pop(slot, None)
                return free.pop(place)
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if nbytes < _MAPPED:
            start = self._end
        self._end = start + nbytes
        return Slot(start, nbytes)


def write_at(file: int, data: Tensor, start: int) -> None:
    """Write bytes, uint8 and contiguous in the processor's memory, at a place of a file."""
    view = _view(data)
    done = 0
    while done < len(view):
        done += os.pwritev(file, [view[done:]], start + done)


def read_at(file: int, start: int, nbytes: int) -> Tensor:
    """Bytes at a place of a file, uint8.

    Raises:
        EOFError: the file ends before.
    """
    data = torch.empty(nbytes, dtype=torch.uint8)
    view = _view(data)
    done = 0
    while done < nbytes:
        got = os.preadv(file, [view[done:]], start + done)
        if got == 0:
            raise EOFError("these states were never written")
        done += got
    return data


def _view(data: Tensor) -> memoryview:
    view: memoryview = data.numpy().data
    return view if data.numel() else memoryview(b"")


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage, uint8, where it lies."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
