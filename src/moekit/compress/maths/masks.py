"""Which entries of a matrix are zeroed: pure functions from scores to masks.

Legend: R rows (outputs), C columns (inputs), M length of a group of consecutive inputs.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
from torch import Tensor

from moekit.errors import BadConfig

UNSTRUCTURED = "unstructured"
_GROUPS = re.compile(r"^(\d+):(\d+)$")


def groups_of(pattern: str) -> tuple[int, int] | None:
    """The numbers n and m of a pattern `n:m` (n zeros in each m consecutive inputs); None for "unstructured".

    Raises:
        BadConfig: neither, or not 0 < n < m.
    """
    if pattern == UNSTRUCTURED:
        return None
    match = _GROUPS.match(pattern)
    zeros, length = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < zeros < length:
        raise BadConfig(
            f"{pattern!r} is no sparsity pattern", hint=f"write n:m with 0 < n < m, as in 2:4, or {UNSTRUCTURED!r}"
        )
    return zeros, length


def zeros_in(count: int, sparsity: float) -> int:
    """floor(sparsity * count), safe against products that fall just short of a whole number."""
    return math.floor(sparsity * count + 1e-12 * count)


def smallest_in_rows(scores_RC: Tensor, count: int) -> Tensor:
    """True at the `count` smallest scores of each row; of equal scores the lower columns go first.

    Equals a stable ascending sort of each row, at the cost of a selection.

    Args:
        scores_RC: finite scores; further leading axes are rows too.
        count: how many of each row, 0 to C.

    Returns:
        A mask of the same shape.
    """
    if count <= 0:
        return torch.zeros_like(scores_RC, dtype=torch.bool)
    limit_R1 = scores_RC.kthvalue(count, dim=-1, keepdim=True).values
    mask_RC = scores_RC <= limit_R1
    crowded_R = mask_RC.sum(-1) > count
    if bool(crowded_R.any()):  # more scores equal the limit than there is room for
        rows_RC, limit_R1 = scores_RC[crowded_R], limit_R1[crowded_R]
        below_RC, equal_RC = rows_RC < limit_R1, rows_RC == limit_R1
        room_R1 = count - below_RC.sum(-1, keepdim=True)
        mask_RC[crowded_R] = below_RC | (equal_RC & (equal_RC.cumsum(-1, dtype=torch.int32) <= room_R1))
    return mask_RC


def smallest_in_groups(scores_RC: Tensor, zeros: int, length: int) -> Tensor:
    """True at the `zeros` smallest scores of each `length` consecutive columns; of equal scores the lower column first.

    Args:
        scores_RC: scores.
        zeros: n of the pattern n:m.
        length: m.

    Raises:
        BadConfig: the columns are no multiple of m.
    """
    columns = scores_RC.shape[-1]
    if columns % length:
        raise BadConfig(
            f"{columns} inputs do not divide into groups of {length}",
            hint=f"choose a pattern whose length divides {columns}, or {UNSTRUCTURED!r}",
        )
    groups_RGM = scores_RC.reshape(*scores_RC.shape[:-1], columns // length, length)
    rank_RGM = torch.zeros(groups_RGM.shape, dtype=torch.int16, device=scores_RC.device)
    for column in range(length):
        mine_RG1 = groups_RGM[..., column : column + 1]
        # A column ranks behind every smaller one, and behind equal ones on its left.
        rank_RGM[..., :column] += mine_RG1 < groups_RGM[..., :column]
        rank_RGM[..., column + 1 :] += mine_RG1 <= groups_RGM[..., column + 1 :]
    return (rank_RGM < zeros).flatten(-2)


def smallest(scores_RC: Tensor, sparsity: float, pattern: str, per: Literal["row", "matrix"] = "row") -> Tensor:
    """True where a matrix is zeroed.

    Args:
        scores_RC: finite scores.
        sparsity: share to zero; the pattern n:m zeroes n of m whatever this says.
        pattern: "unstructured" or n:m.
        per: what is compared with what: entries of one row, or of the whole matrix.

    Raises:
        BadConfig: an impossible pattern for this matrix.
    """
    if (groups := groups_of(pattern)) is not None:
        return smallest_in_groups(scores_RC, *groups)
    if per == "matrix":
        flat_1N = scores_RC.reshape(1, -1)
        return smallest_in_rows(flat_1N, zeros_in(flat_1N.shape[1], sparsity)).view_as(scores_RC)
    return smallest_in_rows(scores_RC, zeros_in(scores_RC.shape[-1], sparsity))
