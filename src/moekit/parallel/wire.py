"""How a row and what belongs to it travel as one: bytes side by side, so that one collective carries all.

A packed row is ``[hidden state | router weights of its slots | local ids of its slots]``, padded to whole
words. On the way out hidden states may be kept in 8 bits with one scale for each block of numbers.

Legend: P rows, H hidden size, S slots, B bytes of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Codec = Literal["none", "int8"]
# Numbers that share one scale in 8 bits.
BLOCK = 128
_SCALE = 4


@dataclass(frozen=True)
class RowFormat:
    """Bytes of a packed row.

    Attributes:
        hidden: H.
        dtype: of the hidden states.
        slots: S; 0 where rows carry neither weights nor ids.
        weight_dtype: of the router weights.
        ids: whether local ids travel along.
        most: largest id.
        codec: "int8" sends hidden states in 8 bits.
    """

    hidden: int
    dtype: torch.dtype
    slots: int = 0
    weight_dtype: torch.dtype = torch.float32
    ids: bool = False
    most: int = 0
    codec: Codec = "none"

    @property
    def id_dtype(self) -> torch.dtype:
        """Smallest type that holds an id."""
        return torch.uint8 if self.most < 256 else torch.int16

    @property
    def blocks(self) -> int:
        """Scales of a row in 8 bits."""
        return -(-self.hidden // BLOCK) if self.codec == "int8" else 0

    @property
    def _word(self) -> int:
        """Every part begins at a multiple of it, so that each can be viewed in its own type."""
        return max(_SCALE, self.dtype.itemsize, self.weight_dtype.itemsize)

    @property
    def _parts(self) -> tuple[int, int, int, int]:
        state = self.hidden if self.codec == "int8" else self.hidden * self.dtype.itemsize
        state += -state % self._word
        weights = self.slots * self.weight_dtype.itemsize
        weights += -weights % self._word
        scales = self.blocks * _SCALE
        scales += -scales % self._word
        return state, scales, weights, self.slots * self.id_dtype.itemsize if self.ids else 0

    @property
    def nbytes(self) -> int:
        """B."""
        used = sum(self._parts)
        return used + -used % self._word

    @property
    def metadata(self) -> int:
        """Bytes of a row that are not hidden state."""
        return self.nbytes - self._parts[0]

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """A buffer for so many rows."""
        return torch.empty(rows, self.nbytes, dtype=torch.uint8, device=device)

    def states(self, packed_PB: Tensor) -> Tensor:
        """The hidden states inside a buffer, a view: [P, H] (int8 values where the codec says so)."""
        if self.codec == "int8":
            return packed_PB[:, : self.hidden].view(torch.int8)
        return packed_PB[:, : self.hidden * self.dtype.itemsize].view(self.dtype)

    def scales(self, packed_PB: Tensor) -> Tensor:
        """The scales inside a buffer, a view: [P, blocks] fp32."""
        start = self._parts[0]
        return packed_PB[:, start : start + self.blocks * _SCALE].view(torch.float32)

    def weights(self, packed_PB: Tensor) -> Tensor:
        """The router weights inside a buffer, a view: [P, S]."""
        start = sum(self._parts[:2])
        return packed_PB[:, start : start + self.slots * self.weight_dtype.itemsize].view(self.weight_dtype)

    def local_ids(self, packed_PB: Tensor) -> Tensor:
        """The local ids inside a buffer, a view: [P, S]."""
        start = sum(self._parts[:3])
        return packed_PB[:, start : start + self._parts[3]].view(self.id_dtype)


def gather_rows(target_PH: Tensor, source_NH: Tensor, token_P: Tensor) -> None:
    """Copy rows of one tensor into a view of a buffer."""
    if target_PH.is_contiguous() and not source_NH.requires_grad:
        torch.index_select(source_NH, 0, token_P, out=target_PH)
    else:
        target_PH.copy_(source_NH.index_select(0, token_P))


def quantize(rows_PH: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit rows with one scale for each block: values [P, H] int8 and scales [P, ceil(H / BLOCK)] fp32.

    Symmetric, nearest: the error of a number is at most half its block's scale, 1/254 of the block's largest number.
    """
    rows, hidden = rows_PH.shape
    padded = torch.nn.functional.pad(rows_PH.float(), (0, -hidden % BLOCK)).view(rows, -1, BLOCK)
    scale = padded.abs().amax(-1) / 127
    values = (padded / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().clamp(-127, 127)
    return values.to(torch.int8).view(rows, -1)[:, :hidden], scale


def dequantize(values_PH: Tensor, scales_PJ: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` made, back in a floating type."""
    rows, hidden = values_PH.shape
    padded = torch.nn.functional.pad(values_PH.float(), (0, -hidden % BLOCK)).view(rows, -1, BLOCK)
    return (padded * scales_PJ.unsqueeze(-1)).view(rows, -1)[:, :hidden].to(dtype)
