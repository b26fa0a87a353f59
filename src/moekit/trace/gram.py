"""Second moments X^T X of rows that come in small batches.

A product of many rows is fast where it is one product; and it is symmetric, so that half of it need not be computed.

Legend: n rows, C columns, b columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.batch import widest

# Rows that wait for one product: few enough for sums in fp32, and for memory.
_ROWS = 2048
# Columns of the blocks, of which those above the diagonal are mirrored.
_COLUMNS = 256


class Gram:
    """Sum of x x^T over rows x.

    Args:
        columns: C.
        device: where.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._total_CC = torch.zeros(columns, columns, dtype=widest(device), device=device)
        self._waiting: list[Tensor] = []
        self.rows = 0

    def add(self, rows_nC: Tensor) -> None:
        """Take in rows; they are multiplied in their own dtype, and sums of some thousand added up in fp64."""
        self._waiting.append(rows_nC)
        self.rows += len(rows_nC)
        if sum(map(len, self._waiting)) >= _ROWS:
            self._flush()

    def total(self) -> Tensor:
        """The sum, [C, C], fp64 (fp32 on Apple's GPUs); its rows and columns are no copy."""
        self._flush()
        for start in range(_COLUMNS, len(self._total_CC), _COLUMNS):
            end = start + _COLUMNS
            self._total_CC[:start, start:end] = self._total_CC[start:end, :start].T
        return self._total_CC

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows_nC = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        for start in range(0, rows_nC.shape[1], _COLUMNS):
            end = start + _COLUMNS
            self._total_CC[start:end, :end] += rows_nC[:, start:end].T @ rows_nC[:, :end]
