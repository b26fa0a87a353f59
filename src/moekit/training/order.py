"""Which rows are trained on, in which order: decided by the seed and the number of rows alone.

The whole run is laid out beforehand as one list, so two models trained with one seed see the same batches, and a run
that resumes finds its place by counting.

Shapes: R rows of the text, N rows of the run, B rows of a micro-batch, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from moekit.data.batches import TokenBatches

# Key of a batch that names its text, where there are several.
TEXT = "text"


def row_order(rows: int, needed: int, seed: int) -> list[int]:
    """Rows of a run: whole passes over the text, each in a random order of its own, cut at `needed`.

    Args:
        rows: R.
        needed: N, at least 1.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < needed:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:needed]


class OrderedRows(Dataset[dict[str, Any]]):
    """Rows of a text in a given order, as Trainer takes them.

    Args:
        rows: the text.
        order: numbers of its rows; a row may come several times.
        numbered: whether a row says its own number (`row`), for a teacher whose output is stored.
    """

    def __init__(self, rows: TokenBatches, order: Sequence[int], *, numbered: bool = False) -> None:
        self._rows = rows
        self._order = order
        self._numbered = numbered

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self._rows[self._order[place]]
        return {**row, "row": torch.tensor(self._order[place])} if self._numbered else row


class InTurn(Dataset[dict[str, Any]]):
    """Micro-batches of several texts in turn: each process sees the first text, then the second, ..., and again.

    Args:
        texts: name -> its rows in order; each as many as the others.
        batch: rows of a micro-batch.
        world: processes, which take micro-batches one after the other.
    """

    def __init__(self, texts: Mapping[str, OrderedRows], batch: int, world: int) -> None:
        self._names = list(texts)
        self._texts = list(texts.values())
        self._batch = batch
        self._world = world

    def __len__(self) -> int:
        return sum(len(text) for text in self._texts)

    def __getitem__(self, place: int) -> dict[str, Any]:
        micro, within = divmod(place, self._batch)
        turn, process = divmod(micro, self._world)
        of_text, text = divmod(turn, len(self._texts))
        row = self._texts[text][(of_text * self._world + process) * self._batch + within]
        return {**row, TEXT: self._names[text]}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows to a batch [B, S], without the columns that are padding in all of them; a text's name stays one name."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != TEXT}
    longest = max(int(batch["attention_mask"].sum(dim=1).max()), 2)
    cut: dict[str, Any] = {key: value[:, :longest] if value.dim() == 2 else value for key, value in batch.items()}
    return cut | {TEXT: rows[0][TEXT]} if TEXT in rows[0] else cut
