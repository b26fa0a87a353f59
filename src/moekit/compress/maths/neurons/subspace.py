"""The subspace that the matrices of several experts share (Sub-MoE, arXiv:2506.23266).

Matrices W_i side by side, [W_1 ... W_n] = U S [V_1^T ... V_n^T], have the basis U in common. Averaging the V_i and
putting U S in front again is the mean of the W_i as long as all of U is kept, and U_r U_r^T times that mean where the
first r columns are. These are the first eigenvectors of G = sum_i W_i W_i^T, so that nothing wide is decomposed. Where
inputs are weighed by what they are, G = sum_i W_i C_i W_i^T, C_i the second moment of what reaches W_i: the factor of
C_i that whitens cancels in the mean, and needs no inverse.

Legend: O outputs, J inputs of a matrix, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moekit.errors import NumericFault


def union_gram(members: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """G = sum over matrices of W C W^T, [O, O] in fp64.

    Args:
        members: each matrix W [O, J] with the second moment C [J, J] of its inputs, None for the identity.
    """
    total_OO: Tensor | None = None
    for matrix_OJ, moment_JJ in members:
        wide_OJ = matrix_OJ.double()
        right_OJ = wide_OJ if moment_JJ is None else wide_OJ @ moment_JJ.to(wide_OJ)
        own_OO = right_OJ @ wide_OJ.T
        total_OO = own_OO if total_OO is None else total_OO + own_OO
    if total_OO is None:
        raise ValueError("no matrices")
    return (total_OO + total_OO.T) / 2


def project(mean_OJ: Tensor, gram_OO: Tensor, rank: int) -> Tensor:
    """U_r U_r^T times a matrix, U_r the eigenvectors of the R largest eigenvalues; the matrix itself from full rank on.

    Args:
        mean_OJ: of the matrices, whatever their shares.
        gram_OO: see `union_gram`.
        rank: R, at least 1.

    Returns:
        In the dtype of the mean.

    Raises:
        NumericFault: weights or moments hold NaN or infinity.
    """
    if rank >= len(gram_OO):
        return mean_OJ
    if not bool(gram_OO.isfinite().all()):
        raise NumericFault("weights or moments hold NaN or infinity", hint="look at the weights: `moekit check`")
    basis_OR = torch.linalg.eigh(gram_OO).eigenvectors[:, -rank:]
    projected_OJ: Tensor = basis_OR @ (basis_OR.T @ mean_OJ.double())
    return projected_OJ.to(mean_OJ.dtype)
