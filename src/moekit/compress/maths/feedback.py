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
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC.flip(0, 1))
        if not int(failed):
            # With both axes turned round, H = R R^T of an upper R, so that H^-1 = R^-T R^-1: U is the inverse of R.
            unit_CC = torch.eye(len(lower_CC), dtype=lower_CC.dtype, device=lower_CC.device)
            upper_CC: Tensor = torch.linalg.solve_triangular(lower_CC.flip(0, 1), unit_CC, upper=True)
            return upper_CC
        damp = 10 * max(damp, 1e-4)
    return None


def round_with_feedback(matrix_RC: Tensor, upper_CC: Tensor, bits: int, group: int, symmetric: bool = False) -> Tensor:
    """A matrix rounded column by column, each error made up for by the columns behind it.

    A group's grid is taken from its weights as they are when its turn comes, with all errors before them passed on. Of
    a diagonal `upper_CC`, nothing is passed on, and the result is `round_to_nearest`'s to the bit.

    Args:
        matrix_RC: finite weights; not changed.
        upper_CC: see `inverse_factor`.
        bits: of a weight.
        group: inputs that share scale and zero point; 0 for a whole row.
        symmetric: whether the zero point is the middle of each grid.

    Raises:
        NumericFault: see `grid_of`.
    """
    # Columns of the matrix lie one after the other here, each in one piece of memory.
    left_CR = matrix_RC.float().T.contiguous().clone()
    made_CR, upper_CC = torch.empty_like(left_CR), upper_CC.float()
    for first, last in groups_of_columns(len(left_CR), group):
        grid = grid_of(left_CR[first:last].T, bits, symmetric).across
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            upper_bb, error_bR = upper_CC[start:end, start:end], torch.empty_like(left_CR[start:end])
            for c, step in enumerate(upper_bb.diagonal().tolist()):
                column_1R = left_CR[start + c : start + c + 1]
                rounded_1R = grid.nearest(column_1R)
                made_CR[start + c] = rounded_1R[0]
                error_bR[c] = (column_1R - rounded_1R)[0] / step
                left_CR[start + c + 1 : end].addr_(upper_bb[c, c + 1 :], error_bR[c], alpha=-1)
            left_CR[end:] -= upper_CC[start:end, end:].T @ error_bR
    return made_CR.T.to(matrix_RC.dtype).contiguous()
