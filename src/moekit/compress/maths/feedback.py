"""GPTQ's rounding (ICLR 2023, arXiv:2210.17323): what a weight loses is made up for by those not rounded yet.

Columns are rounded one after the other. The error of a column, divided by its entry of U, is taken off the columns
behind it along its row of U, where H^-1 = U^T U is the inverse of the inputs' second moment: so the matrix's output
changes as little as the remaining weights allow.

U is inverted nowhere but inside a block. With H = R R^T, R upper, an output changes by the norm of D R, D what the
weights lose; block J of it is the sum over I <= J of D_I R_IJ, and with the blocks before J rounded it is least where
D_J = -(sum over I < J of D_I R_IJ) R_JJ^-1. That is what rounding column by column along U has made of block J when its
turn comes; inside of it, U_JJ = R_JJ^-1.

Legend: R rows (outputs) and C columns (inputs) of a matrix, b columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.compress.maths.rounding import Grid, grid_of, groups_of_columns

# Columns whose errors are passed on to all others together.
_BLOCK = 128
# Columns of a block that are rounded one by one; larger blocks are halved, and halves pass errors on together.
_FEW = 16
# How often the damping grows tenfold before a moment is given up.
_TRIES = 6


def upper_factor(moment_CC: Tensor, damp: float) -> Tensor | None:
    """R of H = R R^T, upper triangular, H = moment + damp * mean(diagonal) I; in the moment's dtype.

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
    # Turned round in both axes, the lower factor that libraries give is the upper one.
    turned_CC = moment_CC.flip(0, 1)
    turned_CC.diagonal().add_(torch.where(diagonal_C == 0, mean, 0.0).flip(0))
    for _ in range(_TRIES):
        turned_CC.diagonal().add_(damp * mean)
        lower_CC, failed = torch.linalg.cholesky_ex(turned_CC)
        if not int(failed):
            upper_CC: Tensor = lower_CC.flip(0, 1)
            return upper_CC
        damp = 10 * max(damp, 1e-4)
    return None


def round_with_feedback(matrix_RC: Tensor, upper_CC: Tensor, bits: int, group: int, symmetric: bool = False) -> Tensor:
    """A matrix rounded column by column, each error made up for by the columns behind it.

    A group's grid is taken from its weights as they are when its turn comes, with all errors before them passed on. Of
    a diagonal `upper_CC`, nothing is passed on, and the result is `round_to_nearest`'s to the bit.

    Args:
        matrix_RC: finite weights; not changed.
        upper_CC: see `upper_factor`.
        bits: of a weight.
        group: inputs that share scale and zero point; 0 for a whole row.
        symmetric: whether the zero point is the middle of each grid.

    Raises:
        NumericFault: see `grid_of`.
    """
    # Columns of the matrix lie one after the other here, each in one piece of memory.
    given_CR = matrix_RC.float().T.contiguous()
    made_CR, lost_CR = torch.empty_like(given_CR), torch.empty_like(given_CR)
    upper32_CC = upper_CC.float()

    def turn_of(start: int, end: int, inverse_bb: Tensor) -> Tensor:
        """Weights of some columns with all errors before them passed on."""
        if not start:
            return given_CR[:end].clone()
        passed_bR = upper32_CC[:start, start:end].T @ lost_CR[:start]
        return torch.addmm(given_CR[start:end], inverse_bb.T, passed_bR)

    for first, last in groups_of_columns(len(given_CR), group):
        grid = None
        if last - first > _BLOCK:
            left_gR = turn_of(first, last, _inverse(upper_CC[first:last, first:last]) if first else upper32_CC[:0])
            grid = grid_of(left_gR.T, bits, symmetric).across
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            inverse_bb = _inverse(upper_CC[start:end, start:end])
            left_bR = turn_of(start, end, inverse_bb)
            grid = grid or grid_of(left_bR.T, bits, symmetric).across
            _round_block(left_bR, inverse_bb, grid, made_CR[start:end])
            torch.sub(given_CR[start:end], made_CR[start:end], out=lost_CR[start:end])
    return made_CR.T.to(matrix_RC.dtype).contiguous()


def _inverse(upper_bb: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, in fp32."""
    unit_bb = torch.eye(len(upper_bb), dtype=upper_bb.dtype, device=upper_bb.device)
    inverse_bb: Tensor = torch.linalg.solve_triangular(upper_bb, unit_bb, upper=True)
    return inverse_bb.float()


def _round_block(left_bR: Tensor, inverse_bb: Tensor, grid: Grid, made_bR: Tensor) -> Tensor:
    """Round the columns of one block into `made_bR`; returns the error of each, divided by its entry of U.

    Args:
        left_bR: weights with all errors before the block passed on; errors of the block are passed on in place.
        inverse_bb: U inside the block.
        grid: of the columns.
        made_bR: filled.
    """
    columns = len(left_bR)
    error_bR = torch.empty_like(left_bR)
    if columns > _FEW:
        half = columns // 2
        error_bR[:half] = _round_block(left_bR[:half], inverse_bb[:half, :half], grid, made_bR[:half])
        left_bR[half:].addmm_(inverse_bb[:half, half:].T, error_bR[:half], alpha=-1)
        error_bR[half:] = _round_block(left_bR[half:], inverse_bb[half:, half:], grid, made_bR[half:])
        return error_bR
    for c, step in enumerate(inverse_bb.diagonal().tolist()):
        rounded_1R = grid.nearest(left_bR[c : c + 1])
        torch.sub(left_bR[c : c + 1], rounded_1R, out=error_bR[c : c + 1]).div_(step)
        made_bR[c : c + 1] = rounded_1R
        left_bR[c + 1 :].addcmul_(inverse_bb[c, c + 1 :, None], error_bR[c : c + 1], value=-1)
    return error_bR
