"""Grids worked by hand, and against one weight at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.compress.maths.rounding import grid_of, round_to_nearest
from moekit.errors import NumericFault


@pytest.mark.parametrize(
    ("row", "bits", "group", "wanted"),
    [
        # 1 bit: the mean of |W| is .5; zero counts as positive.
        ([0.5, -1.0, 0.25, -0.25], 1, 0, [0.5, -0.5, 0.5, -0.5]),
        ([0.0, -2.0], 1, 0, [1.0, -1.0]),
        ([1.0, -1.0, 4.0, 2.0], 1, 2, [1.0, -1.0, 3.0, 3.0]),
        # 2 bits from -.6 to 2.4: s = 1, z = round(.6) = 1, so that the values are -1, 0, 1, 2.
        ([-0.6, 0.4, 1.4, 2.4], 2, 0, [-1.0, 0.0, 1.0, 2.0]),
        # Two groups, each with a grid of its own: s = 1 and s = 10. One for the row would have s = 10.
        ([-1.0, 2.0, 10.0, -20.0], 2, 2, [-1.0, 2.0, 10.0, -20.0]),
        ([-1.0, 2.0, 10.0, -20.0], 2, 0, [0.0, 0.0, 10.0, -20.0]),
        # The range is widened to hold zero: from 0 to 6, s = 2; 1.5 steps are rounded to the even number 2.
        ([3.0, 6.0, 0.0, 1.9], 2, 0, [4.0, 6.0, 0.0, 2.0]),
        ([-3.0, -6.0, 0.0, -1.9], 2, 0, [-4.0, -6.0, 0.0, -2.0]),
        ([0.0, 0.0, 0.0, 0.0], 3, 2, [0.0, 0.0, 0.0, 0.0]),
        ([7.0, 7.0, 0.0, 3.0], 3, 0, [7.0, 7.0, 0.0, 3.0]),
    ],
)
def test_by_hand(row: list[float], bits: int, group: int, wanted: list[float]) -> None:
    assert round_to_nearest(torch.tensor([row]), bits, group).tolist() == [wanted]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_weight_at_a_time(bits: int, dtype: torch.dtype) -> None:
    matrix = (torch.randn(5, 24, generator=torch.Generator().manual_seed(bits)) * 0.1).to(dtype)
    made = round_to_nearest(matrix, bits, 8)
    assert made.dtype == dtype
    for r in range(5):
        for first in (0, 8, 16):
            values = [float(v) for v in matrix[r, first : first + 8]]
            if bits == 1:
                step = float(np.float16(sum(map(abs, values)) / 8))
                wanted = [step if v >= 0 else -step for v in values]
            else:
                low, high = min(0.0, *values), max(0.0, *values)
                step = float(np.float16((high - low) / (2**bits - 1)))
                zero = round(-low / step)
                wanted = [(min(max(round(v / step) + zero, 0), 2**bits - 1) - zero) * step for v in values]
            assert torch.equal(made[r, first : first + 8], torch.tensor(wanted).to(dtype))


def test_more_bits_are_nearer_and_sixteen_change_nothing() -> None:
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((round_to_nearest(matrix, bits, 16) - matrix).norm()) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(round_to_nearest(matrix, 16, 16), matrix)


def test_tiny_and_huge_weights() -> None:
    assert bool(round_to_nearest(torch.full((2, 8), 1e-12), 3, 0).isfinite().all())
    with pytest.raises(NumericFault, match="float16"):
        grid_of(torch.full((1, 4), 1e7), 2)


@pytest.mark.parametrize(
    ("row", "bits", "group", "wanted"),
    [
        # s = 2 * 1.5 / 3 = 1: the values are -2, -1, 0, 1. Halves go to the even number: 1.5 to 2, which is not there.
        ([1.5, 0.4, -1.4, -0.6], 2, 0, [1.0, 0.0, -1.0, -1.0]),
        ([-1.5, 0.4, 1.4, 0.6], 2, 0, [-2.0, 0.0, 1.0, 1.0]),
        # s = 2 * 7.5 / 15 = 1 and s = 2 * 15 / 15 = 2.
        ([-7.5, 7.4, 15.0, -6.9], 4, 2, [-8.0, 7.0, 14.0, -6.0]),
        # A scale of 2 * 2.251 / 15 = .30013 has more than eight significant bits; the nearest of these is .30078125.
        ([2.251, 0.1, 0.2, 0.0], 4, 0, [7 * 0.30078125, 0.0, 0.30078125, 0.0]),
        ([0.0, -2.0], 1, 0, [1.0, -1.0]),
        ([0.0, 0.0], 4, 0, [0.0, 0.0]),
    ],
)
def test_symmetric_by_hand(row: list[float], bits: int, group: int, wanted: list[float]) -> None:
    assert round_to_nearest(torch.tensor([row]), bits, group, symmetric=True).tolist() == [wanted]


@pytest.mark.parametrize("bits", range(1, 9))
def test_symmetric_scales_lie_in_every_half_precision_and_zero_in_the_middle(bits: int) -> None:
    values = torch.randn(64, 16, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-8, 3, 64)[:, None]
    grid = grid_of(values, bits, symmetric=True)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(grid.scale_R1.to(dtype).float(), grid.scale_R1)
    assert bool((grid.zero_R1 == 2 ** (bits - 1)).all())
    if bits > 1:  # no weight is off by more than half a step, but for what eight bits of scale lose
        off = ((grid.nearest(values) - values).abs() / grid.scale_R1)[grid.scale_R1[:, 0] >= 2**-14]
        assert len(off) > 20
        assert float(off.max()) <= 0.5 + 2 ** (bits - 1) * 2**-8
    with pytest.raises(NumericFault, match="float16 does not hold"):
        grid_of(torch.full((1, 4), 6e7), bits, symmetric=True)
