"""torch's product with weights of four bits, for packed matrices of any width and for few tokens.

`torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies bfloat16 inputs by weights (u - 8) s + z, u four bits, s and z
for each row and group of 32 to 256 columns. Numbers of up to 4 bits are one such plane. Numbers of 5 to 8 bits are two,
n = 16 h + l with h from -8 to 7 and l from 0 to 15: both planes' rows lie in one matrix, and its two answers are added.

Weights are not rounded anew but for bfloat16, in which the kernel multiplies; activations are rounded to bfloat16 and
never scaled, so a token's answer does not depend on those beside it.

Legend: R rows (outputs) and C columns (inputs) of a matrix, P planes times rows, G groups, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns that share a scale in the kernel, the largest first.
_GROUPS = (256, 128, 64, 32)
# Rows that the kernel takes together.
_ROWS = 16


@dataclass(frozen=True, eq=False)
class Laid:
    """A matrix as the kernel takes it.

    Attributes:
        packed: numbers, in a layout that only the kernel knows.
        scales_GP2: scales and zeros, bfloat16.
        rows: R; half of the packed rows where there are two planes.
    """

    packed: Tensor
    scales_GP2: Tensor
    rows: int


def kernel_there() -> bool:
    """Whether this torch has the kernel for CPUs."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return all(hasattr(torch.ops.aten, name) for name in names)


def kernel_group(rows: int, columns: int, groups: int) -> int | None:
    """How many columns share a scale in the kernel; None where it does not take such a matrix."""
    if rows % _ROWS or columns % groups:
        return None
    return next((group for group in _GROUPS if (columns // groups) % group == 0), None)


def lay(numbers_RC: Tensor, scale_RG: Tensor, bits: int) -> Laid:
    """Bring a matrix into the kernel's layout.

    Args:
        numbers_RC: int8; see `moekit.checkpoint.quantized.packed_experts`.
        scale_RG: of its groups; `kernel_group` must not be None.
        bits: of a number.
    """
    rows, columns = numbers_RC.shape
    group = kernel_group(rows, columns, scale_RG.shape[1])
    assert group is not None
    scale_RG = scale_RG.float().repeat_interleave(columns // group // scale_RG.shape[1], 1)
    number_RC = numbers_RC.int()
    if bits <= 4:
        unsigned, scale, zero = number_RC + 8, scale_RG, torch.zeros_like(scale_RG)
    else:  # 16 h + l = 16 (u_h - 8) + (u_l - 8) + 8
        unsigned = torch.cat([(number_RC >> 4) + 8, number_RC & 15])
        scale = torch.cat([16 * scale_RG, scale_RG])
        zero = torch.cat([torch.zeros_like(scale_RG), 8 * scale_RG])
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)
    scales_GP2 = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()
    return Laid(packed, scales_GP2, rows)


def multiply(given_nC: Tensor, matrix: Laid) -> Tensor:
    """Inputs times the matrix, transposed: [n, R], bfloat16 for one plane and fp32 for the sum of two."""
    scales_GP2 = matrix.scales_GP2.bfloat16()
    group = given_nC.shape[1] // len(scales_GP2)
    made_nP: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        given_nC.bfloat16().contiguous(), matrix.packed, group, scales_GP2
    )
    if made_nP.shape[1] == matrix.rows:
        return made_nP
    return made_nP[:, : matrix.rows].float() + made_nP[:, matrix.rows :].float()


def lay_all(matrices: Iterable[tuple[Tensor, Tensor, int]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Matrices of one shape in the kernel's layout, stacked by their number of planes.

    Args:
        matrices: numbers, scales and bits of each.

    Returns:
        Planes -> (packed numbers, scales), in the order of the matrices.
    """
    found: dict[int, list[Laid]] = {}
    for numbers_RC, scale_RG, bits in matrices:
        found.setdefault(planes_of(bits), []).append(lay(numbers_RC, scale_RG, bits))
    return {
        planes: (torch.stack([laid.packed for laid in some]), torch.stack([laid.scales_GP2 for laid in some]))
        for planes, some in found.items()
    }


def planes_of(bits: int) -> int:
    """How many planes of four bits hold numbers of so many bits."""
    return 1 if bits <= 4 else 2
