"""Matrices as a low rank and a few rows more: W = L R + Z (MC-SMoE, arXiv:2310.01334).

Legend: E matrices, P bases, O outputs, J inputs of a matrix, R rank, N rows that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def factorize(weight_OJ: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best low rank and what it leaves: L = U_r sqrt(S_r), R = sqrt(S_r) V_r^T, Z = W - L R.

    Args:
        weight_OJ: W.
        rank: R, at most min(O, J).

    Returns:
        L [O, R], R [R, J] and Z [O, J] in the dtype of W; Z is taken from L and R as they are rounded, so that the
        three give W again as exactly as the dtype can.
    """
    wide_OJ = weight_OJ.detach().double()
    left_OO, values_S, right_SJ = torch.linalg.svd(wide_OJ, full_matrices=False)
    root_R = values_S[:rank].sqrt()
    left_OR = (left_OO[:, :rank] * root_R).to(weight_OJ.dtype)
    right_RJ = (root_R[:, None] * right_SJ[:rank]).to(weight_OJ.dtype)
    rest_OJ = wide_OJ - left_OR.double() @ right_RJ.double()
    return left_OR, right_RJ, rest_OJ.to(weight_OJ.dtype)


def share_basis(matrices: Sequence[Tensor], basis: Sequence[int], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """One L for each group of matrices, and what tells its members apart: the subspace that they share (Sub-MoE).

    L holds the eigenvectors of the largest eigenvalues of sum_i W_i W_i^T, which are the first left singular vectors of
    [W_1 ... W_n]; R_i = L^T W_i and Z_i = W_i - L R_i. Averaging the R_i would be a merge; kept apart they cost
    r (O + n J) numbers in the place of n O J, and no averaging.

    Args:
        matrices: W_i, [O, J] each.
        basis: for each its group, numbered from 0.
        rank: of L.

    Returns:
        L [P, O, R], R [E, R, J] and Z [E, O, J], in the matrices' dtype.
    """
    lefts = []
    for group in range(max(basis) + 1):
        members = [matrix.detach().double() for matrix, own in zip(matrices, basis, strict=True) if own == group]
        gram_OO = torch.stack([matrix @ matrix.T for matrix in members]).sum(0)
        lefts.append(torch.linalg.eigh(gram_OO).eigenvectors[:, -rank:].flip(1).to(matrices[0].dtype))
    rights, rests = [], []
    for matrix_OJ, own in zip(matrices, basis, strict=True):
        wide_OJ, left_OR = matrix_OJ.detach().double(), lefts[own].double()
        right_RJ = (left_OR.T @ wide_OJ).to(matrix_OJ.dtype)
        rights.append(right_RJ)
        rests.append((wide_OJ - left_OR @ right_RJ.double()).to(matrix_OJ.dtype))
    return torch.stack(lefts), torch.stack(rights), torch.stack(rests)


def joined(left_OR: Tensor, right_RJ: Tensor, row_N: Tensor, rows_NJ: Tensor) -> Tensor:
    """L R + Z, in fp32: [O, J].

    Args:
        left_OR: L.
        right_RJ: R.
        row_N: which outputs have a row in Z.
        rows_NJ: these rows.
    """
    whole_OJ: Tensor = left_OR.float() @ right_RJ.float()
    return whole_OJ.index_add(0, row_N, rows_NJ.float())


def applied(given_nJ: Tensor, left_OR: Tensor, right_RJ: Tensor, row_N: Tensor, rows_NJ: Tensor) -> Tensor:
    """Inputs times (L R + Z)^T, without making the matrix: [n, O]. See `joined`."""
    output_nO = (given_nJ @ right_RJ.to(given_nJ.dtype).T) @ left_OR.to(given_nJ.dtype).T
    if not len(row_N):
        return output_nO
    return output_nO.index_add(1, row_N, (given_nJ @ rows_NJ.to(given_nJ.dtype).T).to(output_nO.dtype))
