"""What the layers of one walk answered last, in files: for a walk that goes on after its process has ended.

Two files take turns, so that a process that ends while one is written leaves the other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from moekit._files import open_own, read_text
from moekit.checkpoint.atomic import atomic_write
from moekit.streaming.nested import described, rebuilt
from moekit.streaming.spill import bytes_of, read_at, write_at


class Answers:
    """Answers of a layer to all batches, in a folder.

    Args:
        folder: where.
        name: of the files.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._base = folder / name
        self._index = -1
        self._end = 0
        self._told: dict[int, Any] = {}
        self._file: int | None = None

    def put(self, index: int, number: int, answer: Any) -> None:
        """Write what layer `index` answered to a batch.

        Raises:
            Unstorable: it holds something else than tensors and plain values.
        """
        tensors: list[torch.Tensor] = []
        structure = described(answer, tensors)
        if index != self._index:
            self.close()
            self._meta(index).unlink(missing_ok=True)
            self._file = open_own(self._data(index), os.O_RDWR)
            self._index, self._end, self._told = index, 0, {}
        assert self._file is not None
        places = []
        for tensor in tensors:
            data = bytes_of(tensor.detach().cpu().clone(memory_format=torch.contiguous_format).untyped_storage())
            write_at(self._file, data, self._end)
            places.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._end])
            self._end += data.numel()
        self._told[number] = {"structure": structure, "tensors": places}

    def seal(self, index: int, batches: int) -> bool:
        """Say that the answers of a layer are whole; False if they are not."""
        if self._index != index or len(self._told) != batches:
            return False
        if self._file is not None:
            os.fsync(self._file)  # what says that they are whole must not reach the disk before them
        atomic_write(self._meta(index), json.dumps({"index": index, "answers": self._told}))
        return True

    def sealed(self, index: int, batches: int) -> bool:
        """Whether there are answers of a layer to so many batches."""
        return index >= 0 and len(self._read_meta(index)) == batches

    def get(self, index: int, number: int) -> Any:
        """What layer `index` had answered to a batch, in the processor's memory."""
        told = self._read_meta(index)[str(number)]
        tensors = []
        file = os.open(self._data(index), os.O_RDONLY)
        try:
            for dtype, shape, start in told["tensors"]:
                kind: torch.dtype = getattr(torch, dtype)
                nbytes = torch.Size(shape).numel() * kind.itemsize
                tensors.append(read_at(file, start, nbytes).view(kind).view(shape))
        finally:
            os.close(file)
        return rebuilt(told["structure"], tensors)

    def forget(self) -> None:
        """No walk may go on from what is here."""
        self.close()
        for parity in (0, 1):
            self._meta(parity).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; its folder's owner removes it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._index = -1

    def _read_meta(self, index: int) -> dict[str, Any]:
        if not self._meta(index).is_file():
            return {}
        told = json.loads(read_text(self._meta(index)))
        return told["answers"] if told["index"] == index else {}

    def _data(self, index: int) -> Path:
        return self._base.with_name(f"{self._base.name}-{index % 2}")

    def _meta(self, index: int) -> Path:
        return self._base.with_name(f"{self._base.name}-{index % 2}.json")
