"""Eight-bit floats: e4m3 (or e5m2) weights, each multiplied by the scale of its block, its row, or the whole tensor.

DeepSeek-V3, MiniMax, Qwen3 (`quant_method: fp8`): `x.weight` [N, K] in F8_E4M3 beside `x.weight_scale_inv` [ceil(N /
b), ceil(K / c)], blocks of b x c, 128 x 128 unless `weight_block_size` says otherwise; the last block of a row or
column may be cut off. In spite of its name the scale multiplies. Without blocks it is one number, or one a row.
compressed-tensors calls the same things `float-quantized` and the scale `x.weight_scale`.

By hand, blocks of 2 x 2 and a weight of two rows and three columns:

    stored  1  2 | 4      scales  0.5 | 10      weight  0.5  1    40
            3 -1 | 2                                    1.5 -0.5  20

Legend: E experts, N rows, K columns, n and k blocks of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.quantized.base import (
    SCALE,
    WEIGHT,
    WIDE,
    Beside,
    Format,
    Packed,
    ceil_div,
    demand_dtype,
    unreadable,
    wrong_shape,
)

EIGHT_BITS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Scales may be powers of two, stored as their exponent: E8M0, or the same in a plain byte.
_EXPONENTS = frozenset({"F8_E8M0", "U8"})
_DEFAULT_BLOCK = (128, 128)


class Fp8(Format):
    """Weights in eight-bit floats.

    Args:
        settings: with `weight_block_size`, two numbers, or null where scales are of rows or whole tensors.
    """

    ending = ""
    plain_ending = ""
    beside = (Beside(SCALE, ("_scale_inv", "_scale")),)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        told = settings.get("weight_block_size", _DEFAULT_BLOCK)
        if told is not None and not (
            isinstance(told, list | tuple) and len(told) == 2 and all(type(size) is int and size > 0 for size in told)
        ):
            raise unreadable(f"weight_block_size is {told!r}, not two numbers")
        self._block = None if told is None else (told[0], told[1])
        # Some folders of whole scales say nothing, and others mean blocks of the usual size: the scales tell.
        self._whole = told is None or "weight_block_size" not in settings

    def holds(self, info: TensorInfo) -> bool:
        """Whether it is in eight bits, and no scale itself."""
        return info.dtype in EIGHT_BITS and len(info.shape) >= 2 and "_scale" not in info.name

    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """The shape is the weight's own."""
        weight, scale = parts[WEIGHT], parts[SCALE]
        demand_dtype(scale, WIDE | _EXPONENTS)
        *stack, rows, columns = weight.shape
        fitting: dict[tuple[int, ...], tuple[tuple[int, int], tuple[int, int]]] = {}
        for grid, block in self._grids(rows, columns):
            fitting.setdefault((*stack, *grid), (grid, block))
            if grid[1] == 1 and block[1] == columns:  # written in fewer axes, too
                fitting.setdefault((*stack, grid[0]), (grid, block))
            if grid == (1, 1) and block == (rows, columns):
                fitting.setdefault(tuple(stack), (grid, block))
        if len(stack) > 1 or scale.shape not in fitting:
            raise wrong_shape(scale, next(iter(fitting)))
        grid, block = fitting[scale.shape]
        return Packed(name, parts, weight.shape, stacked=len(stack) == 1, facts={"grid": grid, "block": block})

    def _grids(self, rows: int, columns: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Numbers of scales that a weight may have, and the rows and columns that share one."""
        found = []
        if self._block is not None:
            plain = ceil_div(rows, self._block[0]), ceil_div(columns, self._block[1])
            found.append((plain, self._block))
            if rows % 2 == 0:  # gate and up, stacked above each other, may each begin with a block of its own
                found.append(((2 * ceil_div(rows // 2, self._block[0]), plain[1]), self._block))
        if self._whole:
            found += [((1, 1), (rows, columns)), ((rows, 1), (1, columns))]
        return found

    def unpack(self, packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Eight bits times scale."""
        weight_NK = widened(parts[WEIGHT])
        scale_nk = exponents_or_floats(parts[SCALE]).reshape(*weight_NK.shape[:-2], *packed.facts["grid"])
        return scaled_blocks(weight_NK, scale_nk, packed.facts["block"])


@functools.cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """The number that each byte stands for, [256]."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def widened(weight: torch.Tensor) -> torch.Tensor:
    """Eight-bit floats as float32; by a table, which a CPU follows three times faster than it converts."""
    index = weight.contiguous().view(torch.uint8).flatten().int()
    return _values(weight.dtype).index_select(0, index).view(weight.shape)


def exponents_or_floats(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32: a byte b stands for 2 ** (b - 127), and 255 for NaN."""
    if scale.dtype == torch.uint8:
        scale = scale.contiguous().view(torch.float8_e8m0fnu)
    return scale.float()


def scaled_blocks(weight_NK: torch.Tensor, scale_nk: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiply, in place, each block of a weight [..., N, K] by its scale [..., n, k].

    Args:
        weight_NK: float32.
        scale_nk: float32; twice ceil(N / 2b) rows where two stacked halves begin with a block each.
        block: b rows, c columns.
    """
    rows, columns = weight_NK.shape[-2:]
    if scale_nk.shape[-2] != ceil_div(rows, block[0]):
        for part, scale in zip(weight_NK.chunk(2, -2), scale_nk.chunk(2, -2), strict=True):
            scaled_blocks(part, scale, block)
        return weight_NK
    scale_Nk = scale_nk.repeat_interleave(block[0], -2)[..., :rows, :]
    whole = columns // block[1]
    if whole:
        blocks = weight_NK[..., : whole * block[1]]
        blocks.view(*blocks.shape[:-1], whole, block[1]).mul_(scale_Nk[..., :whole, None])
    if columns % block[1]:
        weight_NK[..., whole * block[1] :].mul_(scale_Nk[..., whole:])
    return weight_NK
