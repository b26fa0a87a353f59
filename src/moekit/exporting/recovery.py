"""Whole numbers and scales out of weights that were rounded to symmetric grids and stored as floats.

A stored weight is q s rounded to the stored dtype, q a whole number from -2^(b-1) to 2^(b-1) - 1 and s a scale of eight
significant bits. Neither is kept beside the weights, and neither needs to be: the largest weight of a group is some q
times s, so that each |q| leaves one to three scales to try. The first that gives back every weight of the group, bit
for bit, will do: what is packed computes what the folder does.

Legend: R rows (outputs) and C columns (inputs) of a matrix, G groups of a row, N groups of all rows, g columns of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The scale of groups of zeros: the smallest that float16 holds.
_LEAST = 2.0**-24
# What lies next to a scale, in units of its last bit: stored weights may have been rounded themselves.
_BESIDE = (0, -1, 1)


class Recovered(NamedTuple):
    """A matrix as whole numbers and scales.

    Attributes:
        numbers_RC: int16, from -2^(b-1) to 2^(b-1) - 1; at 1 bit -1 and 1.
        scale_RG: fp32; float16 and bfloat16 hold it, too.
    """

    numbers_RC: Tensor
    scale_RG: Tensor

    def weights(self, dtype: torch.dtype) -> Tensor:
        """What they stand for: products, rounded once."""
        rows, columns = self.numbers_RC.shape
        numbers_RGg = self.numbers_RC.float().view(rows, self.scale_RG.shape[1], -1)
        return (numbers_RGg * self.scale_RG[..., None]).view(rows, columns).to(dtype)


def recover(matrix_RC: Tensor, bits: int, group: int) -> Recovered | None:
    """The numbers and scales that a rounded matrix stands for; None where it does not lie on such grids.

    Args:
        matrix_RC: stored weights.
        bits: of a number, 1 to 8.
        group: inputs that share a scale; 0 for a whole row.
    """
    rows, columns = matrix_RC.shape
    width = group or columns
    if columns % width:
        return None
    stored_Ng = matrix_RC.reshape(-1, width)
    numbers_Ng = torch.zeros(stored_Ng.shape, dtype=torch.int16)
    scale_N = torch.full((len(stored_Ng),), _LEAST)
    left_N = torch.arange(len(stored_Ng))
    if bits > 1:
        left_N = left_N[stored_Ng.ne(0).any(-1)]
    for most in range(max(1, 1 << (bits - 1)), 0, -1):
        for beside in _BESIDE:
            if not len(left_N):
                break
            some_Ng = stored_Ng[left_N]
            tried_N = _next_to(some_Ng.float().abs().amax(-1) / most, beside)
            q_Ng, good_N = _tried(some_Ng, tried_N, bits)
            found_N = left_N[good_N]
            numbers_Ng[found_N], scale_N[found_N] = q_Ng[good_N].to(torch.int16), tried_N[good_N]
            left_N = left_N[~good_N]
    if len(left_N):
        return None
    return Recovered(numbers_Ng.view(rows, columns), scale_N.view(rows, -1))


def _next_to(scale_N: Tensor, steps: int) -> Tensor:
    """The scale of eight significant bits that lies so many steps from the nearest one."""
    return (scale_N.bfloat16().view(torch.int16) + steps).view(torch.bfloat16).float()


def _tried(stored_Ng: Tensor, scale_N: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Numbers by these scales, and in which groups they give back every weight."""
    legal_N = (scale_N > 0) & (scale_N.half().float() == scale_N)
    scale_N1 = torch.where(legal_N, scale_N, 1.0)[:, None]
    q_Ng = (stored_Ng.float() / scale_N1).round()
    low, high = (-1, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    q_Ng = q_Ng.clamp(low, high)
    equal_N = ((q_Ng * scale_N1).to(stored_Ng.dtype) == stored_Ng).all(-1)
    if bits == 1:
        equal_N &= (q_Ng != 0).all(-1)
    return q_Ng, legal_N & equal_N
