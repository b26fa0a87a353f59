"""A tensor of the output, and what it takes of which bytes of the source.

Legend: E experts, M experts kept, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from moekit.checkpoint.digest import read_range
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.reading import TensorReader
from moekit.checkpoint.safety import TensorInfo
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.shard_writer import Spec
from moekit.compress.engine.token_table import preferences, renumbered


@dataclass(frozen=True)
class Cut:
    """What is left of an axis: `keep` of `experts` equal parts, and a tail that belongs to none.

    Attributes:
        axis: which one.
        experts: equal parts in the source.
        keep: those that stay, in the order of the output.
        tail: entries behind the parts, all of which stay.
    """

    axis: int
    experts: int
    keep: tuple[int, ...]
    tail: int = 0

    def size(self, before: int) -> int:
        """Entries of the axis in the output."""
        return (before - self.tail) // self.experts * len(self.keep) + self.tail

    def pieces(self, before: int) -> list[tuple[int, int]]:
        """Ranges of entries in the source, in the order of the output."""
        each = (before - self.tail) // self.experts
        parts = [(expert * each, (expert + 1) * each) for expert in self.keep]
        return [*parts, (before - self.tail, before)] if self.tail else parts


@dataclass(frozen=True)
class TokenTable:
    """How the numbers of a table change that names the experts of every token id.

    Attributes:
        outcome: which experts stay.
        experts: E before.
        router: the tensor of the router's rows [E, H]; None where there is no such one.
    """

    outcome: LayerOutcome
    experts: int
    router: str | None

    def renumbered(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """The table of this name by new numbers."""
        with TensorReader(checkpoint) as reader:
            rows_EH = None if self.router is None else reader.read(self.router)
            return renumbered(reader.read(name), preferences(self.outcome, self.experts, rows_EH), self.outcome)


@dataclass(frozen=True)
class KeptTensor:
    """A tensor of the output and where its bytes lie in the source.

    Attributes:
        name: in the output.
        source: the tensor it comes from.
        layer: decoder layer, of tensors that belong to routed experts or count them; else None.
        cut: what is left of it; None for all.
        resized: sizes in the output where experts change their width; None where the cut says all.
        table: how its numbers change where it names experts; None where its bytes are the source's.
    """

    name: str
    source: TensorInfo
    layer: int | None = None
    cut: Cut | None = None
    resized: tuple[int, ...] | None = None
    table: TokenTable | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the output."""
        if self.resized is not None:
            return self.resized
        if self.cut is None:
            return self.source.shape
        size = self.cut.size(self.source.shape[self.cut.axis])
        return (*self.source.shape[: self.cut.axis], size, *self.source.shape[self.cut.axis + 1 :])

    @property
    def spec(self) -> Spec:
        """What the output's header says of it."""
        return Spec(self.name, self.source.dtype, self.shape)

    @property
    def scattered(self) -> bool:
        """Whether its bytes are no few ranges of the source's; then `gather` them."""
        return self.table is not None or (self.cut is not None and prod(self.source.shape[: self.cut.axis]) != 1)

    def ranges(self) -> list[tuple[int, int]]:
        """Byte ranges in the source's shard, in the order of the output."""
        start, end = self.source.offsets
        if self.cut is None:
            return [(start, end)]
        entries = self.source.shape[self.cut.axis]
        size = (end - start) // entries
        return [(start + first * size, start + last * size) for first, last in self.cut.pieces(entries)]

    def gather(self, checkpoint: Checkpoint) -> memoryview:
        """The bytes of a tensor whose experts do not lie together; the whole source tensor is read."""
        if self.table is not None:
            made = self.table.renumbered(self.source.name, checkpoint)
            return made.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert self.cut is not None
        data = read_range(checkpoint.path / self.source.shard, self.source.offsets)
        entries = self.source.shape[self.cut.axis]
        rows = data.reshape(prod(self.source.shape[: self.cut.axis]), entries, -1)
        parts = [rows[:, first:last] for first, last in self.cut.pieces(entries)]
        view: memoryview = np.ascontiguousarray(np.concatenate(parts, axis=1)).reshape(-1).data
        return view
