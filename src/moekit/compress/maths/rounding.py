"""Round weights to few bits and back: what a quantized model computes with, without its packing.

Consecutive inputs of a row, a group, share one grid of 2^bits values: a scale, kept as a packed form holds it
(float16), and a whole zero point, so that zero itself stays zero. At 1 bit there are the two values -scale and +scale.
A symmetric grid's zero point is the middle one, 2^(bits - 1), and its scale has eight significant bits: float16 and
bfloat16 both hold it, so that engines compute the same weights in whichever of them they keep scales.

Legend: R rows (outputs) and C columns (inputs) of a matrix, g columns of one group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.errors import NumericFault

# The smallest scale above zero that float16 holds: groups of zeros have one, too.
_LEAST = 2.0**-24


class Grid(NamedTuple):
    """The values that one group of each row may take.

    Attributes:
        scale_R1: distance of neighbours; at 1 bit of both values from zero.
        zero_R1: number of the grid point that is zero; unused at 1 bit.
        bits: of a weight.
    """

    scale_R1: Tensor
    zero_R1: Tensor
    bits: int

    @property
    def across(self) -> Grid:
        """The same for values that lie the other way round, [g, R]."""
        return Grid(self.scale_R1.T, self.zero_R1.T, self.bits)

    def nearest(self, values_Rg: Tensor) -> Tensor:
        """The nearest value of the grid to each value, in fp32; at 1 bit zero counts as positive."""
        if self.bits == 1:
            return torch.where(values_Rg >= 0, self.scale_R1, -self.scale_R1)
        # In place: called for every column, where each new tensor costs more than its numbers do.
        points_Rg = (values_Rg / self.scale_R1).round_().add_(self.zero_R1)
        return points_Rg.clamp_(0, 2**self.bits - 1).sub_(self.zero_R1).mul_(self.scale_R1)


def grid_of(values_Rg: Tensor, bits: int, symmetric: bool = False) -> Grid:
    """The grid of one group of each row.

    s = (max - min) / (2^bits - 1) and z = round(-min / s), the range widened to hold zero; at 1 bit s = mean |W|, which
    is the scale of least squared error. Symmetric: s = 2 max |W| / (2^bits - 1) and z = 2^(bits - 1).

    Args:
        values_Rg: finite fp32 weights.
        bits: of a weight, at least 1.
        symmetric: whether the zero point is the middle of the grid.

    Raises:
        NumericFault: weights so large that no float16 holds their scale.
    """
    if bits == 1:
        wide_R1, low_R1 = values_Rg.abs().mean(-1, keepdim=True), None
    elif symmetric:
        wide_R1, low_R1 = values_Rg.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1), None
    else:
        low_R1 = values_Rg.amin(-1, keepdim=True).clamp_max(0)
        wide_R1 = (values_Rg.amax(-1, keepdim=True).clamp_min(0) - low_R1) / (2**bits - 1)
    scale_R1 = (wide_R1.bfloat16() if symmetric else wide_R1).half().float().clamp_min(_LEAST)
    if not bool(scale_R1.isfinite().all()):
        raise NumericFault(
            f"a group of weights needs a scale of {float(wide_R1.max()):.3g}, which float16 does not hold",
            hint="the file may be damaged (see `moekit check`)",
        )
    if low_R1 is None:
        zero_R1 = torch.full_like(scale_R1, 2 ** (bits - 1))
    else:
        zero_R1 = (-low_R1 / scale_R1).round().clamp(0, 2**bits - 1)
    return Grid(scale_R1, zero_R1, bits)


def groups_of_columns(columns: int, group: int) -> list[tuple[int, int]]:
    """First and behind-the-last column of each group; the last one may be shorter. A group of 0 is the whole row."""
    step = group or columns
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def round_to_nearest(matrix_RC: Tensor, bits: int, group: int, symmetric: bool = False) -> Tensor:
    """Each weight to the nearest value of its group's grid, worked in fp32. From 16 bits on weights stay.

    Args:
        matrix_RC: finite weights.
        bits: of a weight.
        group: inputs that share scale and zero point; 0 for a whole row.
        symmetric: whether the zero point is the middle of each grid.

    Raises:
        NumericFault: see `grid_of`.
    """
    if bits >= 16:
        return matrix_RC.clone()
    made_RC = torch.empty_like(matrix_RC)
    for start, end in groups_of_columns(matrix_RC.shape[-1], group):
        values_Rg = matrix_RC[:, start:end].float()
        made_RC[:, start:end] = grid_of(values_Rg, bits, symmetric).nearest(values_Rg).to(matrix_RC.dtype)
    return made_RC
