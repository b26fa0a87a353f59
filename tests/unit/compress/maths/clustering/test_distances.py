"""Distances of experts against plain formulas."""

from __future__ import annotations

import torch

from moekit.compress.maths.clustering.distances import euclidean, root_mean_square


def test_equal_rows_are_at_distance_zero_whatever_the_size() -> None:
    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 100
    rows[31] = rows[7]
    distance = euclidean(rows)
    assert float(distance[7, 31]) == 0.0
    assert torch.equal(distance, distance.T)
    torch.testing.assert_close(distance[3, 5], (rows[3].double() - rows[5].double()).norm())


def test_outputs_that_differ_around_one_mean_by_hand() -> None:
    # Two experts on two tokens: (1,0), (-1,0) and (-1,0), (1,0). The means are equal, the outputs 2 apart.
    made_EN2 = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]])
    gram = torch.einsum("enh,fnh->ef", made_EN2, made_EN2)
    assert float(euclidean(made_EN2.mean(1))[0, 1]) == 0.0
    assert root_mean_square(gram, 2).tolist() == [[0.0, 2.0], [2.0, 0.0]]


def test_the_root_mean_square_is_that_of_each_token() -> None:
    made_ENH = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = root_mean_square(torch.einsum("enh,fnh->ef", made_ENH, made_ENH), 7)
    expected = (made_ENH[:, None] - made_ENH[None]).square().sum(-1).mean(-1).sqrt()
    torch.testing.assert_close(found, expected)
    # The distance of the means and the variance of the difference add up to it.
    apart = made_ENH[:, None] - made_ENH[None]
    spread = (apart - apart.mean(2, keepdim=True)).square().sum(-1).mean(-1)
    torch.testing.assert_close(found.square(), euclidean(made_ENH.mean(1)).square() + spread)


def test_no_tokens_and_rounding_give_no_nan() -> None:
    assert root_mean_square(torch.zeros(2, 2), 0).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert root_mean_square(torch.tensor([[1.0, 1.0 + 1e-7], [1.0 + 1e-7, 1.0]]), 1).tolist() == [
        [0.0, 0.0],
        [0.0, 0.0],
    ]
