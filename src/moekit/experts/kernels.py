"""Products with packed matrices for few tokens on a CPU, by kernels that torch brings.

Few tokens are bound by the bytes of the weights, so the integers themselves are multiplied. Which kernel does it
follows from the width, the groups and the processor, and is told by `kernel_for`:

- "int4": up to 4 bits. `aten._weight_int4pack_mm_for_cpu` takes weights (u - 8) s, u four bits, s for each row and
  group of 32 to 256 columns. Activations are rounded to bfloat16.
- "int8-rows": 5 to 8 bits, a scale for the whole row, on processors that add products of bytes in 32 bits (VNNI).
  Activations become whole numbers of 14 bits, each token by a scale of its own, in two halves of 7 bits: sums are
  exact, and an answer does not depend on the tokens beside it. Halves of 8 bits would overflow 16-bit sums on
  processors without VNNI, in silence; halves of 7 cannot.
- "int8": the same without VNNI. `aten._weight_int8pack_mm`, activations rounded to bfloat16.
- "int4-twice": 5 to 8 bits in groups. n = 16 h + l with h from -8 to 7 and l from 0 to 15: both halves are rows of one
  matrix for the four-bit kernel, whose two answers are added.

Legend: R rows (outputs) and C columns (inputs) of a matrix, G groups, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moekit.experts.packing import Stored

Kernel = Literal["int4", "int8-rows", "int8", "int4-twice"]
# Inputs [n, C] -> [n, R].
Product = Callable[[Tensor], Tensor]

# Columns that share a scale in the four-bit kernel, the largest first, and rows that it takes together.
_GROUPS = (256, 128, 64, 32)
_ROWS = 16
# Halves of an activation have 7 bits, from -64 to 63; so large may the whole be.
_HALF = 64
_MOST = 2 * _HALF * (_HALF - 1) + _HALF - 1
_LEAST = torch.finfo(torch.float32).tiny

# The words of a layer's projection -> stored expert -> its product; gone with the words.
_LAID: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kernel_for(bits: int, rows: int, columns: int, groups: int) -> Kernel | None:
    """Which kernel multiplies such a matrix here; None where none does, and weights are unpacked.

    Args:
        bits: of a number.
        rows: R.
        columns: C.
        groups: of a row.
    """
    four = _has("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    four = four and rows % _ROWS == 0 and _group(columns, groups) is not None
    if bits <= 4:
        return "int4" if four else None
    if groups == 1 and _vnni() and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "int8-rows"
    if groups == 1 and _has("_weight_int8pack_mm") and rows % _ROWS == 0 and columns % _ROWS == 0:
        return "int8"
    return "int4-twice" if four else None


def product(words_N: Tensor, slot: int, take: Callable[[], Sequence[Stored]]) -> Product | None:
    """The product with stored matrices, laid out for their kernel when it is first asked for; None without a kernel.

    Args:
        words_N: that hold the (first) matrix; what is laid out lives as long as they do.
        slot: of the stored experts.
        take: takes the matrices; see `lay`.
    """
    if words_N not in _LAID:
        _LAID[words_N] = {}
    known: dict[int, Product | None] = _LAID[words_N]
    if slot not in known:
        known[slot] = lay(*take())
    return known[slot]


def lay(*some: Stored) -> Product | None:
    """The product with matrices of the same inputs, their outputs behind each other; None where one has no kernel."""
    found = {kernel_for(one.bits, len(one.scale_RG), one.columns, one.scale_RG.shape[1]) for one in some}
    if None in found:
        return None
    if len(found) > 1:
        products = [lay(one) for one in some]
        return lambda given_nC: torch.cat([by(given_nC) for by in products if by is not None], dim=1)
    kernel = found.pop()
    numbers_RC = torch.cat([one.numbers() for one in some])
    scale_RG = torch.cat([one.scale_RG.float() for one in some])
    if kernel == "int8-rows":
        return _by_rows(numbers_RC, scale_RG[:, 0])
    if kernel == "int8":
        return _by_bytes(numbers_RC, scale_RG[:, 0])
    return _by_four_bits(numbers_RC, scale_RG, twice=kernel == "int4-twice")


def _by_four_bits(numbers_RC: Tensor, scale_RG: Tensor, twice: bool) -> Product:
    (rows, columns), groups = numbers_RC.shape, scale_RG.shape[1]
    group = _group(columns, groups)
    assert group is not None
    scale_RG = scale_RG.repeat_interleave(columns // group // groups, 1)
    unsigned, scale, zero = numbers_RC.int() + 8, scale_RG, torch.zeros_like(scale_RG)
    if twice:  # 16 h + l = 16 (u_h - 8) + (u_l - 8) + 8
        unsigned = torch.cat([(numbers_RC.int() >> 4) + 8, numbers_RC.int() & 15])
        scale, zero = torch.cat([16 * scale_RG, scale_RG]), torch.cat([zero, 8 * scale_RG])
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)
    scales = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()

    def product(given_nC: Tensor) -> Tensor:
        given = given_nC.bfloat16().contiguous()
        made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(given, packed, group, scales)
        if twice:
            made = made[:, :rows].float() + made[:, rows:].float()
        return made.to(given_nC.dtype)

    return product


def _by_bytes(numbers_RC: Tensor, scale_R: Tensor) -> Product:
    scale_R = scale_R.bfloat16()

    def product(given_nC: Tensor) -> Tensor:
        made: Tensor = torch.ops.aten._weight_int8pack_mm(given_nC.bfloat16().contiguous(), numbers_RC, scale_R)
        return made.to(given_nC.dtype)

    return product


def _by_rows(numbers_RC: Tensor, scale_R: Tensor) -> Product:
    packed = torch.ops.onednn.qlinear_prepack(numbers_RC, None)
    zeros_R = torch.zeros(len(scale_R), dtype=torch.long)

    def product(given_nC: Tensor) -> Tensor:
        halves, scale_n1 = halved(given_nC.float())
        # Of inputs: scale and zero point. Of the answer: none of either, and nothing done to it.
        given = (halves, 1.0, _HALF)
        answer: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        made: Tensor = torch.ops.onednn.qlinear_pointwise(*given, packed, scale_R, zeros_R, None, *answer)
        high_nR, low_nR = made.chunk(2)
        return torch.add(low_nR, high_nR, alpha=2 * _HALF).mul_(scale_n1).to(given_nC.dtype)

    return product


def halved(given_nC: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as whole numbers of 14 bits: (128 h + l) s, h and l from -64 to 63, s for each token.

    Returns:
        h + 64 and l + 64 behind each other [2 n, C] uint8, and s [n, 1].
    """
    scale_n1 = (given_nC.abs().amax(-1, keepdim=True) / _MOST).clamp_min_(_LEAST)
    # 64 above zero in both halves; what is shifted and masked is positive then.
    whole_nC = (given_nC / scale_n1).round_().int().add_(2 * _HALF * _HALF + _HALF)
    return torch.cat([whole_nC >> 7, whole_nC & 127]).to(torch.uint8), scale_n1


def _group(columns: int, groups: int) -> int | None:
    """How many columns share a scale in the four-bit kernel; None where its groups do not fit."""
    return next((group for group in _GROUPS if columns % groups == 0 and columns // groups % group == 0), None)


def _has(*names: str) -> bool:
    return all(hasattr(torch.ops.aten, name) for name in names)


def _vnni() -> bool:
    """Whether the processor, and torch's choice of code for it, add products of bytes in 32 bits."""
    asked = getattr(torch.cpu, "_is_vnni_supported", None)
    return asked is not None and bool(asked()) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
