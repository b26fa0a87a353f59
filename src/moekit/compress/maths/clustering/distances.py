"""How far apart experts are, in fp64.

Legend: N items, F numbers of an item, E experts, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def euclidean(rows_NF: Tensor) -> Tensor:
    """Euclidean distances between rows, [N, N] fp64, symmetric; exactly 0 between equal rows."""
    # The product form of the distance is faster, but gives equal rows a distance of rounding size.
    rows_NF = rows_NF.double()
    return torch.cdist(rows_NF, rows_NF, compute_mode="donot_use_mm_for_euclid_dist")


def root_mean_square(gram_EE: Tensor, tokens: int) -> Tensor:
    """Root of the mean squared distance of two experts' outputs, sqrt(mean_t ||y_i - y_j||^2), [E, E] fp64, symmetric.

    Args:
        gram_EE: sums over tokens of the inner products <y_i, y_j>.
        tokens: T; all distances are 0 where there are none.
    """
    gram_EE = gram_EE.double()
    gram_EE = (gram_EE + gram_EE.T) / 2
    square_E = gram_EE.diagonal()
    square_EE = square_E[:, None] + square_E[None, :] - 2 * gram_EE
    return (square_EE.clamp_min(0) / max(tokens, 1)).sqrt().fill_diagonal_(0.0)
