"""Nested planes: one set of bits of which every prefix is a coarser version of the same weights.

The first plane is a plain grid of b_1 bits (`moekit.compress.maths.rounding`). Each further plane is one bit a weight,
the sign of what is left, times one scale for each group, the mean size of what is left, which is the scale of least
squared error: W_k = W_(k-1) + s_k sign(W - W_(k-1)), zero counting as positive. So the first k planes alone give W_k,
and the error of a group never rises from one plane to the next. Scales are kept as float16, as a packed form holds
them. (D2MoE, arXiv:2504.15299, its matryoshka weight quantization without the feedback of errors.)

Legend: R rows (outputs) and C columns (inputs) of a matrix, G groups of columns, P planes behind the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.checkpoint.quantized.running import pack_words, unpack_words
from moekit.compress.maths.rounding import grid_of, groups_of_columns


@dataclass(frozen=True, eq=False)
class Planes:
    """A matrix as planes.

    Attributes:
        base: bits of the first plane.
        points_RC: numbers of the grid's points, uint8; at 1 bit 0 for minus and 1 for plus.
        scale_RG: of the grids.
        zero_RG: their zero points; unused at 1 bit.
        signs_PRC: whether what is left is zero or above.
        scales_PRG: of the further planes.
    """

    base: int
    points_RC: Tensor
    scale_RG: Tensor
    zero_RG: Tensor
    signs_PRC: Tensor
    scales_PRG: Tensor

    @property
    def bits(self) -> int:
        """Of all planes together."""
        return self.base + len(self.signs_PRC)

    def weights(self, bits: int | None = None) -> Tensor:
        """What the planes stand for, fp32.

        Args:
            bits: how many of them count, from `base` to `bits`; None for all.
        """
        used = len(self.signs_PRC) if bits is None else bits - self.base
        if not 0 <= used <= len(self.signs_PRC):
            raise ValueError(f"the planes hold {self.base} to {self.bits} bits, not {bits}")
        points_RGg = self._grouped(self.points_RC.float())
        if self.base == 1:
            total_RGg = (2 * points_RGg - 1) * self.scale_RG[..., None]
        else:
            total_RGg = (points_RGg - self.zero_RG[..., None]) * self.scale_RG[..., None]
        for signs_RC, scale_RG in zip(self.signs_PRC[:used], self.scales_PRG[:used], strict=True):
            total_RGg = total_RGg + (2 * self._grouped(signs_RC.float()) - 1) * scale_RG[..., None]
        return total_RGg.reshape(self.points_RC.shape)

    def _grouped(self, values_RC: Tensor) -> Tensor:
        return values_RC.view(*self.scale_RG.shape, -1)


def nest(matrix_RC: Tensor, base: int, bits: int, group: int) -> Planes:
    """Planes of a matrix, worked in fp32.

    Args:
        matrix_RC: finite weights.
        base: bits of the first plane, at least 1.
        bits: of all planes, at least `base`.
        group: inputs that share scales; 0 for a whole row. It must divide C.

    Raises:
        ValueError: fewer bits than the first plane has.
        NumericFault: weights whose scale float16 does not hold.
    """
    if bits < base:
        raise ValueError(f"{bits} bits are fewer than the {base} of the first plane")
    values_RC = matrix_RC.float()
    rows, columns = values_RC.shape
    points, scales, zeros = [], [], []
    for start, end in groups_of_columns(columns, group):
        grid = grid_of(values_RC[:, start:end], base)
        if base == 1:
            points.append(values_RC[:, start:end] >= 0)
        else:
            numbers_Rg = (values_RC[:, start:end] / grid.scale_R1).round() + grid.zero_R1
            points.append(numbers_Rg.clamp(0, 2**base - 1))
        scales.append(grid.scale_R1)
        zeros.append(grid.zero_R1)
    scale_RG, zero_RG = torch.cat(scales, 1), torch.cat(zeros, 1)
    none_RC, none_RG = torch.empty(0, rows, columns, dtype=torch.bool), scale_RG.new_empty(0, *scale_RG.shape)
    planes = Planes(base, torch.cat(points, 1).to(torch.uint8), scale_RG, zero_RG, none_RC, none_RG)
    for _ in range(bits - base):
        planes = _with_another(planes, values_RC)
    return planes


def _with_another(planes: Planes, values_RC: Tensor) -> Planes:
    left_RC = values_RC - planes.weights()
    # A scale may be zero: where nothing is left, another plane must not bring an error.
    scale_RG = left_RC.view(*planes.scale_RG.shape, -1).abs().mean(-1).half().float()
    signs_PRC = torch.cat([planes.signs_PRC, (left_RC >= 0)[None]])
    scales_PRG = torch.cat([planes.scales_PRG, scale_RG[None]])
    return Planes(planes.base, planes.points_RC, planes.scale_RG, planes.zero_RG, signs_PRC, scales_PRG)


def packed_planes(planes: Planes) -> list[dict[str, Tensor]]:
    """Each plane by itself, bits in words: a region that is read or left out on its own.

    Returns:
        Of the first plane `words`, `scale` and, above 1 bit, `zero`; of each further one `words` and `scale`.
    """
    first = {"words": pack_words(planes.points_RC, planes.base), "scale": planes.scale_RG.half()}
    if planes.base > 1:
        first["zero"] = planes.zero_RG.to(torch.uint8)
    further = zip(planes.signs_PRC, planes.scales_PRG, strict=True)
    return [first, *({"words": pack_words(signs, 1), "scale": scale.half()} for signs, scale in further)]


def unpacked_planes(regions: list[Mapping[str, Tensor]], base: int, columns: int) -> Planes:
    """Inverse of `packed_planes`, of all regions or of the first ones alone.

    Args:
        regions: at least the first one.
        base: bits of the first plane.
        columns: C.
    """
    first, further = regions[0], regions[1:]
    scale_RG = first["scale"].float()
    points_RC = unpack_words(first["words"], base, columns)
    zero_RG = first["zero"].float() if base > 1 else torch.ones_like(scale_RG)
    signs = [unpack_words(region["words"], 1, columns).bool() for region in further]
    scales = [region["scale"].float() for region in further]
    return Planes(
        base,
        points_RC,
        scale_RG,
        zero_RG,
        torch.stack(signs) if signs else torch.empty(0, *points_RC.shape, dtype=torch.bool),
        torch.stack(scales) if scales else scale_RG.new_empty(0, *scale_RG.shape),
    )
