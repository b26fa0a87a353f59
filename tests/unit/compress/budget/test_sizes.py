"""What may stay, as a person says it."""

from __future__ import annotations

import pytest

from moekit.compress.budget.sizes import Budget, ByteSizes, uniform_count
from moekit.errors import BadConfig
from moekit.jobs.weights.sizes import budget_of

SIZES = ByteSizes({0: 7, 1: 8}, 2, {0: 10, 1: 10}, 100)


@pytest.mark.parametrize("told", ["1/2", " 2 / 4", ".5", "0.5", 0.5])
def test_a_share_is_said_in_any_way(told: float | str) -> None:
    assert Budget(keep=told).keep == 0.5
    assert uniform_count(Budget(keep=told), SIZES) == {0: 4, 1: 4}


def test_thirds_keep_what_whole_numbers_say() -> None:
    assert uniform_count(Budget(keep="2/3"), ByteSizes({0: 6}, 2, {0: 10}, 0)) == {0: 4}


@pytest.mark.parametrize("told", ["3/2", "0/4", "1/0", "1/2/3", "-1/2", "1/2GiB"])
def test_no_share_is_refused(told: str) -> None:
    with pytest.raises(BadConfig, match="the budget is impossible"):
        budget_of(told, "uniform", None, None)


def test_bytes() -> None:
    assert Budget(keep="1.5 kib").max_bytes == 1536
    assert Budget(keep="1/2").max_bytes is None
