"""Masks against stable sorts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.compress.maths.masks import groups_of, smallest, smallest_in_groups, smallest_in_rows, zeros_in
from moekit.errors import BadConfig


def by_sorting(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = scores.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


cases = st.tuples(st.integers(1, 7), st.integers(1, 24), st.integers(1, 6), st.integers(0, 2**31))


def integers(rows: int, columns: int, values: int, seed: int) -> torch.Tensor:
    """Few distinct values, so that ties are everywhere."""
    return torch.randint(0, values, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=80, deadline=None)
@given(case=cases)
def test_rows_are_a_stable_sort_with_ties_to_the_lower_columns(case: tuple[int, int, int, int]) -> None:
    scores = integers(*case)
    for count in range(scores.shape[1] + 1):
        mask = smallest_in_rows(scores, count)
        assert torch.equal(mask, by_sorting(scores, count))
        assert mask.sum(-1).tolist() == [count] * len(scores)


@settings(max_examples=40, deadline=None)
@given(case=cases, pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)]))
def test_groups_are_rows_of_their_own(case: tuple[int, int, int, int], pattern: tuple[int, int]) -> None:
    rows, groups, values, seed = case
    zeros, length = pattern
    scores = integers(rows, groups * length, values, seed)
    expected = by_sorting(scores.view(rows, groups, length), zeros).view_as(scores)
    assert torch.equal(smallest_in_groups(scores, zeros, length), expected)


def test_two_of_four_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0]])
    assert smallest(scores, 0.5, "2:4").int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert smallest(scores, 0.5, "4:8").int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_a_matrix_is_one_row() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]])
    assert smallest(scores, 0.5, "unstructured", "matrix").int().tolist() == [[1, 1, 1], [0, 0, 0]]
    assert smallest(scores, 0.4, "unstructured", "row").int().tolist() == [[1, 0, 0], [0, 0, 1]]


def test_counts_round_down_but_not_below_whole_products() -> None:
    assert 0.29 * 100 < 29
    assert zeros_in(100, 0.29) == 29
    assert zeros_in(3, 1 / 3) == 1
    assert zeros_in(3, 0.66) == 1
    assert zeros_in(58_720_256, 0.5) == 29_360_128
    assert zeros_in(7, 0.0) == 0


def test_patterns_that_cannot_be() -> None:
    assert groups_of("unstructured") is None
    assert groups_of("2:4") == (2, 4)
    for wrong in ("4:4", "0:4", "5:4", "2-4", "dense", ""):
        with pytest.raises(BadConfig, match="no sparsity pattern"):
            groups_of(wrong)
    with pytest.raises(BadConfig, match="6 inputs do not divide into groups of 4"):
        smallest_in_groups(torch.zeros(2, 6), 2, 4)
