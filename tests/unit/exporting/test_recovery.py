"""Weights on symmetric grids, made here number by number, and found again."""

from __future__ import annotations

import pytest
import torch

from moekit.compress.maths.feedback import round_with_feedback, upper_factor
from moekit.compress.maths.rounding import round_to_nearest
from moekit.exporting.recovery import recover

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(bits: int, dtype: torch.dtype, rows: int = 40, group: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored weights [rows, 3 * group] of numbers chosen at random, and the scales, of eight significant bits."""
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, 3, group), generator=generator)
    if bits == 1:
        numbers = 2 * numbers + 1
    mantissa = torch.randint(128, 256, (rows, 3), generator=generator) / 128
    scales = mantissa * 2.0 ** torch.randint(-13, 0, (rows, 3), generator=generator)
    return (numbers * scales[..., None]).view(rows, -1).to(dtype), scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_any_numbers_are_found_again_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    stored, _ = made(bits, dtype)
    found = recover(stored, bits, 8)
    assert found is not None
    low, high = (-1, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    assert low <= int(found.numbers_RC.min()) <= int(found.numbers_RC.max()) <= high
    # One number and one scale at a time: the product, rounded once, is the stored weight.
    for r in range(0, 40, 7):
        for c in range(24):
            product = float(found.numbers_RC[r, c]) * float(found.scale_RG[r, c // 8])
            assert torch.tensor(product, dtype=torch.float64).to(dtype) == stored[r, c]
    assert torch.equal(found.weights(dtype), stored)
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(found.scale_RG.to(half).float(), found.scale_RG)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_what_quantizing_stores_is_found_again(bits: int, dtype: torch.dtype, group: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    matrix = (torch.randn(24, 48, generator=generator) * 0.05).to(dtype)
    matrix[3] = 0
    inputs = torch.randn(100, 48, generator=generator, dtype=torch.float64)
    upper = upper_factor(inputs.T @ inputs, 0.01)
    assert upper is not None
    for stored in (
        round_to_nearest(matrix, bits, group, symmetric=True),
        round_with_feedback(matrix, upper, bits, group, symmetric=True),
    ):
        found = recover(stored, bits, group)
        assert found is not None
        assert torch.equal(found.weights(dtype), stored)


def test_what_lies_on_no_such_grid_is_not_found() -> None:
    stored, _ = made(4, torch.float32)
    assert recover(stored, 3, 8) is None
    assert recover(stored, 4, 12) is None, "groups of others"
    assert recover(stored, 4, 7) is None, "groups that do not divide"
    off = stored.clone()
    off[5, 5] += 1e-4
    assert recover(off, 4, 8) is None
    assert recover(torch.randn(4, 16), 4, 8) is None
    asymmetric = round_to_nearest(torch.rand(4, 64), 4, 0)
    assert recover(asymmetric, 4, 0) is None
    assert recover(torch.zeros(2, 8), 1, 0) is None, "one bit knows no zero"
