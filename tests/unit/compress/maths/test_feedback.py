"""GPTQ against Optimal Brain Surgeon's formula, weight by weight, without any Cholesky factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.compress.maths import feedback
from moekit.compress.maths.feedback import round_with_feedback, upper_factor
from moekit.compress.maths.rounding import round_to_nearest

DAMP = 0.01


def plain_grid(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a group of each row."""
    if bits == 1:
        return values.abs().mean(1).half().float(), torch.zeros(len(values))
    low, high = values.min(1).values.clamp(max=0), values.max(1).values.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, torch.round(-low / scale)


def textbook(matrix: Tensor, moment: Tensor, bits: int, group: int) -> Tensor:
    """Round column i, spread -e_i / [F^-1]_ii F^-1_(:,i) over the columns left, take i out of F^-1; in fp64."""
    left, made = matrix.double().clone(), torch.zeros_like(matrix)
    columns = matrix.shape[1]
    inverse = torch.linalg.inv(moment.double() + DAMP * moment.double().diagonal().mean() * torch.eye(columns))
    scale, zero = torch.zeros(0), torch.zeros(0)
    for i in range(columns):
        if i % (group or columns) == 0:
            scale, zero = plain_grid(left[:, i : i + (group or columns)].float(), bits)
        value = left[:, i].float()
        if bits == 1:
            rounded = torch.where(value >= 0, scale, -scale)
        else:
            rounded = (torch.clamp(torch.round(value / scale) + zero, 0, 2**bits - 1) - zero) * scale
        made[:, i] = rounded
        error = (left[:, i] - rounded) / inverse[i, i]
        left -= error[:, None] * inverse[i][None]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return made


def correlated(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """Inputs whose channels go together."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(columns // 4, 1), generator=g)
    mixed = few @ torch.randn(few.shape[1], columns, generator=g)
    return mixed + 0.3 * torch.randn(tokens, columns, generator=g)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group"), [(24, 8), (24, 0), (24, 24), (20, 5)])
@pytest.mark.parametrize("block", [128, 3])
def test_textbook(bits: int, columns: int, group: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "_BLOCK", block)
    matrix = torch.randn(6, columns, generator=torch.Generator().manual_seed(bits))
    inputs = correlated(columns, 200).double()
    moment = inputs.T @ inputs
    upper = upper_factor(moment, DAMP)
    assert upper is not None
    wanted = textbook(matrix, moment, bits, group)
    torch.testing.assert_close(round_with_feedback(matrix, upper, bits, group), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [0, 16])
def test_its_outputs_are_nearer_than_rounding_to_nearest(bits: int, group: int) -> None:
    matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    inputs = correlated(64, 600)
    seen, unseen = inputs[:400], inputs[400:]
    upper = upper_factor((seen.T @ seen).double(), DAMP)
    assert upper is not None
    errors = [
        float((unseen @ (made - matrix).T).norm())
        for made in (round_with_feedback(matrix, upper, bits, group), round_to_nearest(matrix, bits, group))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_identity_moment_rounds_to_nearest_to_the_bit(bits: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(9, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    for scale in (1.0, 0.37, 1e5):
        upper = upper_factor(scale * torch.eye(48, dtype=torch.float64), DAMP)
        assert upper is not None
        for group in (0, 16):
            for symmetric in (False, True):
                made = round_with_feedback(matrix, upper, bits, group, symmetric)
                assert torch.equal(made, round_to_nearest(matrix, bits, group, symmetric))


def test_inputs_that_never_come_are_rounded_like_others() -> None:
    matrix = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    inputs = correlated(12, 50).double()
    inputs[:, 5] = 0
    upper = upper_factor(inputs.T @ inputs, DAMP)
    assert upper is not None
    made = round_with_feedback(matrix, upper, 8, 0)
    assert bool(made.isfinite().all())
    assert float((made[:, 5] - matrix[:, 5]).abs().max()) < 0.05
    assert bool((made[:, 5] != 0).all())


def test_moments_of_few_tokens_and_of_none() -> None:
    one = torch.ones(1, 16, dtype=torch.float64)
    assert upper_factor(one.T @ one, DAMP) is not None
    assert upper_factor(torch.zeros(16, 16, dtype=torch.float64), DAMP) is None
    broken = torch.eye(4, dtype=torch.float64)
    broken[0, 1] = broken[1, 0] = 1.05  # as rounding may leave it: not positive definite until the damping has grown
    upper = upper_factor(broken, DAMP)
    assert upper is not None
    assert bool(upper.isfinite().all())
