"""Nested planes: a group by hand, and what must hold of any matrix."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moekit.compress.maths.nested import nest, packed_planes, unpacked_planes
from moekit.compress.maths.rounding import round_to_nearest


def matrix() -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def test_a_group_by_hand() -> None:
    group = torch.tensor([[0.9, -0.6, 0.1, 0.35, -0.2, 0.6]])
    planes = nest(group, 2, 4, 0)
    assert (planes.scale_RG.item(), planes.zero_RG.item()) == (0.5, 1)
    assert planes.points_RC.tolist() == [[3, 0, 1, 2, 1, 2]]
    assert planes.signs_PRC.int().tolist() == [[[0, 0, 1, 0, 0, 1]], [[1, 1, 0, 0, 0, 0]]]
    torch.testing.assert_close(planes.scales_PRG.flatten(), torch.tensor([0.125, 1 / 30]), rtol=5e-4, atol=0)
    wanted = {
        2: ([1, -0.5, 0, 0.5, 0, 0.5], 0.017083),
        3: ([0.875, -0.625, 0.125, 0.375, -0.125, 0.625], 0.0014583),
        4: ([0.90833, -0.59167, 0.09167, 0.34167, -0.15833, 0.59167], 0.00034722),
    }
    for bits, (weights, error) in wanted.items():
        made = planes.weights(bits)
        torch.testing.assert_close(made, torch.tensor([weights]), rtol=0, atol=2e-5)
        assert float((made - group).square().mean()) == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("base", [1, 2, 5])
def test_a_prefix_is_what_fewer_bits_give(base: int) -> None:
    planes = nest(matrix(), base, 8, 32)
    regions = packed_planes(planes)
    errors = []
    for used in range(1, len(regions) + 1):
        bits = base + used - 1
        alone = nest(matrix(), base, bits, 32).weights()
        assert torch.equal(planes.weights(bits), alone)
        # The other regions are not there: the same numbers.
        assert torch.equal(unpacked_planes(regions[:used], base, 64).weights(), alone)
        errors.append((alone - matrix()).view(6, 2, 32).square().sum(-1))
    assert all(bool((after <= before).all()) for before, after in pairwise(errors))
    assert sum(r["words"].numel() * 32 for r in regions) == 8 * 6 * 64


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_one_plane_is_plain_rounding(bits: int) -> None:
    assert torch.equal(nest(matrix(), bits, bits, 16).weights(), round_to_nearest(matrix(), bits, 16))


def test_planes_one_after_the_other_multiply_as_their_sum() -> None:
    planes, given = nest(matrix(), 2, 4, 32), torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    step = given @ planes.weights(2).T
    for plane in range(2):
        signs = (2 * planes.signs_PRC[plane].float() - 1).view(6, 2, 32) * planes.scales_PRG[plane][..., None]
        step = step + given @ signs.view(6, 64).T
    torch.testing.assert_close(step, given @ planes.weights().T, rtol=1e-5, atol=1e-5)


def test_where_nothing_is_left_a_plane_brings_no_error() -> None:
    exact = torch.tensor([[0.0, 0.5, 1.0, 1.5]])
    assert torch.equal(nest(exact, 2, 4, 0).weights(), exact)
    zeros = torch.zeros(1, 4)
    assert torch.equal(nest(zeros, 2, 3, 0).weights(), zeros)
    with pytest.raises(ValueError, match="not 5"):
        nest(exact, 2, 4, 0).weights(5)
    with pytest.raises(ValueError, match="fewer than the 2"):
        nest(exact, 2, 1, 0)
