"""Which rows are trained on, in which order: decided by the seed and the number of rows alone.

The whole run is laid out beforehand as one list, so two models trained with one seed see the same batches, and a run
that resumes finds its place by counting.

Shapes: R rows of the text, N rows of the run, B rows of a micro-batch, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moekit.data.batches import TokenBatches


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


class OrderedRows(Dataset[dict[str, Tensor]]):
    """Rows of a text in a given order, as Trainer takes them.

    Args:
        rows: the text.
        order: numbers of its rows; a row may come several times.
    """

    def __init__(self, rows: TokenBatches, order: Sequence[int]) -> None:
        self._rows = rows
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self._rows[self._order[place]]


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows to a batch [B, S], without the columns that are padding in all of them."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    longest = max(int(batch["attention_mask"].sum(dim=1).max()), 2)
    return {key: value[:, :longest] for key, value in batch.items()}
