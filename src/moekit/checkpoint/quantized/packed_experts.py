"""moekit's own packed experts: whole numbers of 1 to 8 bits, for each matrix its own width, zero in the middle.

`x.weight_packed` [R, ceil(C b / 32)] holds the numbers of a row in 32-bit words, lowest bits first and without gaps,
plus 2^(b-1); of 1 bit, 0 stands for -1 and 1 for +1. `x.weight_scale` [R, G] is bfloat16, which holds the eight
significant bits of a symmetric grid's scale; a weight is number times scale. The config's `quantization_config` says
how many columns there are. How wide the numbers are follows from the words of a row, so experts may be left out or
change places:

    {"format": "packed-experts", "group": 64, "columns": {"gate_proj": 2048, "up_proj": 2048, "down_proj": 768}}

There is no `quant_method` on purpose: stock transformers and vLLM then refuse the folder. Of a method that it does not
know transformers says so in passing, and fills the experts with random numbers.

By hand, 3 bits and scale 0.5: the word 0o7654 holds 4, 5, 6, 7, so 0, 1, 2, 3 and the weights 0, 0.5, 1, 1.5.

Legend: R rows (outputs) and C columns (inputs) of a matrix, G groups of columns, g columns of one, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.quantized.base import (
    SCALE,
    WEIGHT,
    Beside,
    Format,
    Packed,
    broken,
    demand_dtype,
    wrong_shape,
)
from moekit.checkpoint.quantized.running import pack_words, unpack_words, word_count
from moekit.errors import BadConfig

LAYOUT = "packed-experts"
WIDTHS = range(1, 9)
# So that no two widths take as many words.
LEAST_COLUMNS = 32


class PackedExperts(Format):
    """Experts in packed whole numbers, a width for each matrix.

    Args:
        settings: with `group` and `columns`.
    """

    ending = ".weight_packed"
    plain_ending = ".weight"
    beside = (Beside(SCALE, (".weight_scale",)),)

    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """Columns and bits are what the config says; words and scales must fit them."""
        weight, scale = parts[WEIGHT], parts[SCALE]
        demand_dtype(weight, frozenset({"I32"}))
        demand_dtype(scale, frozenset({"BF16"}))
        bits, columns = self._told(weight, name)
        group = self.settings.get("group") or columns
        if not isinstance(group, int) or group < 1 or columns % group:
            raise broken(weight, f"groups of {group} do not divide the {columns} columns of {weight.name}")
        rows = weight.shape[0] if weight.shape else 1
        for info, fitting in ((weight, (rows, word_count(columns, bits))), (scale, (rows, columns // group))):
            if info.shape != fitting:
                raise wrong_shape(info, fitting)
        return Packed(name, parts, (rows, columns), facts={"bits": bits})

    def _told(self, weight: TensorInfo, name: str) -> tuple[int, int]:
        """Bits and columns of a matrix."""
        told: Any = self.settings.get("columns")
        columns: Any = told.get(name.removesuffix(".weight").rpartition(".")[2]) if isinstance(told, Mapping) else None
        if not isinstance(columns, int) or columns < LEAST_COLUMNS:
            raise broken(weight, f"quantization_config does not say how many columns {weight.name} has")
        bits = 32 * weight.shape[-1] // columns if weight.shape else 0
        if bits not in WIDTHS:
            raise broken(weight, f"the words of {weight.name} are not {columns} numbers of 1 to 8 bits")
        return bits, columns

    def unpack(self, packed: Packed, parts: Mapping[str, Tensor]) -> Tensor:
        """Number times scale."""
        numbers_RC = numbers_of(parts[WEIGHT], packed.facts["bits"], packed.shape[1])
        return weights_of(numbers_RC, parts[SCALE])


def words_of(numbers_RC: Tensor, bits: int) -> Tensor:
    """Numbers from -2^(b-1) to 2^(b-1) - 1, of 1 bit -1 and 1, as int32 words.

    Raises:
        BadConfig: numbers that so many bits do not hold.
    """
    if bits == 1:
        if not bool(numbers_RC.abs().eq(1).all()):
            raise BadConfig("1 bit holds -1 and 1 alone")
        return pack_words((numbers_RC.int() + 1) // 2, 1)
    return pack_words(numbers_RC.int() + (1 << (bits - 1)), bits)


def numbers_of(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `words_of`: int8 [R, C]."""
    if bits in (1, 2, 4, 8):  # no number crosses from one byte into the next
        bytes_RB1 = words_RW.contiguous().view(torch.uint8)[..., None]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words_RW.device)
        unsigned_RC = ((bytes_RB1 >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :columns]
    else:
        unsigned_RC = unpack_words(words_RW, bits, columns)
    if bits == 1:
        return unsigned_RC.to(torch.int8) * 2 - 1
    # In 8 bits: 255 wraps to -1, and -1 less 128 wraps to 127, as it should.
    return unsigned_RC.to(torch.int8) - (1 << (bits - 1) if bits < 8 else -128)


def weights_of(numbers_RC: Tensor, scale_RG: Tensor) -> Tensor:
    """Numbers times the scales of their groups, fp32."""
    numbers_RGg = numbers_RC.float().view(*scale_RG.shape, -1)
    weights_RC: Tensor = numbers_RGg.mul_(scale_RG.float()[..., None]).flatten(-2)
    return weights_RC


def announced(group: int, columns: Mapping[str, int]) -> dict[str, Any]:
    """`quantization_config` of a folder.

    Args:
        group: columns that share a scale; 0 for a whole row.
        columns: of each projection, by its name in the file ("gate_proj").
    """
    return {"format": LAYOUT, "group": group, "columns": dict(columns)}
