"""GPTQ's rounding (ICLR 2023, arXiv:2210.17323): what a weight loses is made up for by those not rounded yet.

Columns are rounded one after the other. The error of a column, divided by its entry of U, is taken off the columns
behind it along its row of U, where H^-1 = U^T U is the inverse of the inputs' second moment: so the matrix's output
changes as little as the remaining weights allow.

Legend: R rows (outputs) and C columns (inputs) of a matrix, b columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.compress.maths.rounding import grid_of, groups_of_columns

# Columns whose errors are passed on to all others together.
_BLOCK = 128
# How often the damping grows tenfold before a moment is given up.
_TRIES = 6


def inverse_factor(moment_CC: Tensor, damp: float) -> Tensor | None:
    """U of H^-1 = U^T U, upper triangular, H = moment + damp * mean(diagonal) I; in the moment's dtype.

    Inputs that are always zero count like the mean of all, so that their weights are rounded like the others. Where H
    is not positive definite in floating point, the damping grows tenfold until it is.

    Args:
        moment_CC: sum of x x^T over the inputs x; not changed.
        damp: share of the mean of the diagonal.

    Returns:
        None where the moment says nothing: all inputs are zero, or no damping helps.
    """
    diagonal_C = moment_CC.diagonal()
    mean = float(diagonal_C.mean())
    if not mean > 0:
        return None
    damped_CC = moment_CC.clone()
    damped_CC.diagonal().add_(torch.where(diagonal_C == 0, mean, 0.0))
    for _ in range(_TRIES):
        damped_CC.diagonal().add_(damp * mean)
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        if not int(failed):
            upper_CC, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_CC), upper=True)
            if not int(failed):
                return upper_CC
        damp = 10 * max(damp, 1e-4)
    return None


def round_with_feedback(matrix_RC: Tensor, upper_CC: Tensor, bits: int, group: int) -> Tensor:
    """A matrix rounded column by column, each error made up for by the columns behind it.

    A group's grid is taken from its weights as they are when its turn comes, with all errors before them passed on. Of
    a diagonal `upper_CC`, nothing is passed on, and the result is `round_to_nearest`'s to the bit.

    Args:
        matrix_RC: finite weights; not changed.
        upper_CC: see `inverse_factor`.
        bits: of a weight.
        group: inputs that share scale and zero point; 0 for a whole row.

    Raises:
        NumericFault: see `grid_of`.
    """
    left_RC, made_RC = matrix_RC.float().clone(), torch.empty_like(matrix_RC)
    upper_CC = upper_CC.float()
    columns = matrix_RC.shape[1]
    for first, last in groups_of_columns(columns, group):
        grid = grid_of(left_RC[:, first:last], bits)
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            block_Rb, upper_bb = left_RC[:, start:end], upper_CC[start:end, start:end]
            error_Rb = torch.empty_like(block_Rb)
            for c in range(end - start):
                column_R1 = block_Rb[:, c : c + 1]
                rounded_R1 = grid.nearest(column_R1)
                error_Rb[:, c : c + 1] = (column_R1 - rounded_R1) / upper_bb[c, c]
                made_RC[:, start + c] = rounded_R1[:, 0].to(made_RC.dtype)
                block_Rb[:, c + 1 :] -= error_Rb[:, c : c + 1] * upper_bb[c, c + 1 :]
            left_RC[:, end:] -= error_Rb @ upper_CC[start:end, end:]
    return made_RC
