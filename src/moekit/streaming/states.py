"""Hidden states between two decoder layers, of all batches: in memory up to a limit, else in a file.

Legend: B rows, S positions, H hidden.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moekit._files import open_own

# Beyond this, states go to a file.
MEMORY_BYTES = 1 << 30


class States:
    """Hidden states [B, S, H] of numbered batches; a batch may be overwritten.

    Args:
        shapes: (B, S) of each batch.
        hidden: H.
        dtype: of the states.
        folder: where the file goes; None keeps them in memory up to `limit`, then in the system's temporary folder.
        name: of the file.
        limit: bytes kept in memory where no folder is given.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        hidden: int,
        dtype: torch.dtype,
        *,
        folder: Path | None = None,
        name: str = "states",
        limit: int = MEMORY_BYTES,
    ) -> None:
        self.shapes = list(shapes)
        self.hidden = hidden
        self.dtype = dtype
        self._starts = [0]
        for rows, length in self.shapes:
            self._starts.append(self._starts[-1] + rows * length * hidden * dtype.itemsize)
        self._kept: dict[int, Tensor] = {}
        self._file: int | None = None
        if folder is not None:
            self._file = open_own(folder / name, os.O_RDWR)
        elif self.nbytes > limit:
            unnamed, path = tempfile.mkstemp(prefix="moekit-states-")
            os.unlink(path)  # gone by itself, whatever ends the process
            self._file = unnamed

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self._starts[-1]

    def get(self, batch: int) -> Tensor:
        """States of a batch, [B, S, H]; the caller's own in memory, a copy from a file."""
        if self._file is None:
            return self._kept[batch]
        tensor = torch.empty((*self.shapes[batch], self.hidden), dtype=self.dtype)
        self._read(_bytes(tensor), self._starts[batch], batch)
        return tensor

    def rows(self, batch: int, index_n: Tensor) -> Tensor:
        """Copies of the states at some flat positions of a batch, [n, H]; of a file, no more is read than these."""
        if self._file is None:
            return self._kept[batch].flatten(0, 1)[index_n]
        rows_nH = torch.empty(len(index_n), self.hidden, dtype=self.dtype)
        size, view = self.hidden * self.dtype.itemsize, _bytes(rows_nH)
        done = 0
        for first, count in _runs(index_n):
            end = done + count * size
            self._read(view[done:end], self._starts[batch] + first * size, batch)
            done = end
        return rows_nH

    def _read(self, view: memoryview, start: int, batch: int) -> None:
        done = 0
        while done < len(view):
            assert self._file is not None
            got = os.preadv(self._file, [view[done:]], start + done)
            if got == 0:
                raise EOFError(f"states of batch {batch} were never written")
            done += got

    def put(self, batch: int, states: Tensor) -> None:
        """Keep states of a batch, [B, S, H]."""
        states = states.detach().to(device="cpu", dtype=self.dtype)
        if self._file is None:
            self._kept[batch] = states
            return
        view = _bytes(states.contiguous())
        done = 0
        while done < len(view):
            done += os.pwritev(self._file, [view[done:]], self._starts[batch] + done)

    def close(self) -> None:
        """Close the file; its folder's owner removes it."""
        self._kept.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _runs(index_n: Tensor) -> list[tuple[int, int]]:
    """First position and length of each run of positions that follow each other."""
    if not len(index_n):
        return []
    breaks = (index_n.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(index_n)]
    firsts = index_n[starts].tolist()
    return [(first, end - start) for first, start, end in zip(firsts, starts, ends, strict=True)]


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    data: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return data if tensor.numel() else memoryview(b"")
