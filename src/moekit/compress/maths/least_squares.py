"""Least-squares repair of a matrix whose inputs became fewer or others, in closed form.

Where an expert gave y = D h and is now given h~ (kept neurons, say), the matrix D' that gives most of y back minimises

    sum_t w_t^2 ||y_t - D' h~_t||^2 + lam ||D' - D0||^2,   so that   D' = (M + lam D0) (S + lam I)^-1

with S = sum w^2 h~ h~^T and M = sum w^2 y h~^T. The ridge pulls towards D0, not towards zero: what no token says
anything about stays as it is. lam is a share of the mean of S's diagonal, so that the scale of w does not count.

Legend: H outputs, I inputs before, J inputs that stay, L inputs that go.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Least ridge, as a share of the mean of the diagonal: a moment of fewer tokens than inputs has no inverse.
_LEAST = 1e-12
# How often the ridge grows tenfold before a moment is given up.
_TRIES = 8
# Usual ridges: a moment of fewer tokens than so many for each input is a rough one.
_MANY, _FIRM, _ROUGH = 20, 1e-4, 1e-2


def usual_ridge(tokens: int, inputs: int) -> float:
    """The ridge to take where none is asked for: less where a matrix of so many inputs saw many tokens."""
    return _FIRM if tokens > _MANY * inputs else _ROUGH


def refit(cross_HJ: Tensor, moment_JJ: Tensor, start_HJ: Tensor, ridge: float) -> Tensor:
    """D' = (M + lam D0) (S + lam I)^-1, in the moment's dtype.

    Solved for what is added to D0, so that nothing is added where nothing is missing.

    Args:
        cross_HJ: M = sum w^2 y h~^T.
        moment_JJ: S = sum w^2 h~ h~^T.
        start_HJ: D0.
        ridge: lam, as a share of the mean of S's diagonal.

    Returns:
        D0 itself where S is zero, or too far from positive definite.
    """
    start_HJ = start_HJ.to(moment_JJ)
    return start_HJ + _added(cross_HJ.to(moment_JJ) - start_HJ @ moment_JJ, moment_JJ, ridge)


def narrowed(matrix_HI: Tensor, moment_II: Tensor, kept_J: Tensor, ridge: float) -> Tensor:
    """A matrix that does without some inputs: their part is put, as far as that goes, on the inputs that stay.

    Args:
        matrix_HI: D.
        moment_II: C = sum w^2 h h^T of all inputs.
        kept_J: inputs that stay.
        ridge: see `refit`; D0 are the columns that stay.

    Returns:
        D', [H, J] in the moment's dtype.
    """
    gone_L = torch.ones(len(moment_II), dtype=torch.bool, device=moment_II.device)
    gone_L[kept_J] = False
    matrix_HI = matrix_HI.to(moment_II)
    # M - D0 S = D C[:, K] - D[:, K] C[K, K]: a row that loses nothing gains nothing, to the bit.
    rest_HJ = matrix_HI[:, gone_L] @ moment_II[gone_L][:, kept_J]
    return matrix_HI[:, kept_J] + _added(rest_HJ, moment_II[kept_J][:, kept_J], ridge)


def squared_error(matrix_HI: Tensor, moment_II: Tensor, kept_J: Tensor, made_HJ: Tensor) -> float:
    """Sum w^2 ||D h - D' h_K||^2 over the tokens of a moment.

    Args:
        matrix_HI: D.
        moment_II: C = sum w^2 h h^T.
        kept_J: inputs that D' reads.
        made_HJ: D'.
    """
    gap_HI = matrix_HI.to(moment_II).clone()
    gap_HI[:, kept_J] -= made_HJ.to(moment_II)
    return float((gap_HI @ moment_II * gap_HI).sum().clamp_min(0))


def _added(rest_HJ: Tensor, moment_JJ: Tensor, ridge: float) -> Tensor:
    """X of X (S + lam I) = rest; zero where S says nothing."""
    mean = float(moment_JJ.diagonal().mean()) if len(moment_JJ) else 0.0
    share = max(ridge, _LEAST)
    for _ in range(_TRIES if mean > 0 else 0):
        held_JJ = moment_JJ.clone()
        held_JJ.diagonal().add_(share * mean)
        lower_JJ, failed = torch.linalg.cholesky_ex(held_JJ)
        if not int(failed):
            added_HJ: Tensor = torch.cholesky_solve(rest_HJ.T, lower_JJ).T
            return added_HJ
        share *= 10
    return torch.zeros_like(rest_HJ)
