"""The subspace that matrices share, against the decomposition of the matrices side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.compress.maths.neurons.subspace import project, union_gram
from moekit.errors import NumericFault

SHARES = (0.75, 0.25)
FIRST = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
SECOND = torch.tensor([[2.0, 1.0], [0.0, 1.0]])


def by_decomposition(matrices: list[Tensor], shares: tuple[float, ...], rank: int, roots: list[Tensor]) -> Tensor:
    """U_r S_r (sum of shares times V_i^T S_i^-1), with [W_1 S_1 ... W_n S_n] = U S [V_1^T ... V_n^T]."""
    wide = torch.cat([m @ root for m, root in zip(matrices, roots, strict=True)], dim=1)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    parts = right[:rank].split(matrices[0].shape[1], dim=1)
    mean = sum(s * part @ torch.linalg.inv(root) for s, part, root in zip(shares, parts, roots, strict=True))
    return left[:, :rank] @ (values[:rank, None] * mean)


def test_the_worked_example() -> None:
    mean = SHARES[0] * FIRST + SHARES[1] * SECOND
    assert mean.tolist() == [[2.75, 0.25], [0.0, 1.0]]
    gram = union_gram([(FIRST, None), (SECOND, None)])
    assert torch.linalg.eigvalsh(gram).sqrt().tolist() == pytest.approx([1.3846, 3.7527], abs=1e-4)
    expected = torch.tensor([[2.7313, 0.3305], [0.2260, 0.0274]])
    torch.testing.assert_close(project(mean, gram, 1), expected, rtol=0, atol=1e-4)
    assert torch.equal(project(mean, gram, 2), mean)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_projecting_the_mean_is_averaging_what_is_apart(rank: int, whiten: bool) -> None:
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices, shares = [draw(5, 7) for _ in range(3)], (0.5, 0.3, 0.2)
    inputs = [draw(40, 7) for _ in range(3)]
    moments = [x.T @ x for x in inputs]
    roots = [torch.linalg.cholesky(c) if whiten else torch.eye(7, dtype=torch.float64) for c in moments]
    expected = by_decomposition(matrices, shares, rank, roots)
    gram = union_gram([(m, c if whiten else None) for m, c in zip(matrices, moments, strict=True)])
    mean = sum(s * m for s, m in zip(shares, matrices, strict=True))
    assert isinstance(mean, Tensor)
    torch.testing.assert_close(project(mean, gram, rank), expected)


def test_what_is_no_number_is_refused() -> None:
    broken = torch.full((2, 2), float("nan"))
    with pytest.raises(NumericFault, match="NaN or infinity"):
        project(FIRST, union_gram([(broken, None)]), 1)
