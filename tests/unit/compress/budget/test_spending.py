"""Merges that are spent where they cost least."""

from __future__ import annotations

import pytest

from moekit.compress.budget.spending import spend
from moekit.errors import BadConfig

# Of counts 1 to 4.
COSTS = {0: [9.0, 3.0, 1.0, 0.0], 1: [4.0, 2.0, 0.5, 0.0], 2: [0.3, 0.2, 0.1, 0.0], 3: [8.0, 7.0, 6.0, 0.0]}


def cost(layer: int, count: int) -> float:
    return COSTS[layer][count - 1]


FOUR, ONE = dict.fromkeys(COSTS, 4), dict.fromkeys(COSTS, 1)


def test_the_cheapest_next_merge_is_taken() -> None:
    # 0.1, 0.1, 0.1 of layer 2, then 0.5 of layer 1, 1 of layer 0, 1.5 of layer 1.
    assert spend(cost, start=FOUR, lowest=ONE, total=13) == {0: 4, 1: 4, 2: 1, 3: 4}
    assert spend(cost, start=FOUR, lowest=ONE, total=10) == {0: 3, 1: 2, 2: 1, 3: 4}
    assert spend(cost, start=FOUR, lowest=ONE, total=16) == FOUR


@pytest.mark.parametrize("total", [8, 9, 10, 11, 12])
def test_layers_in_a_row_share_their_part(total: int) -> None:
    made = spend(cost, start=FOUR, lowest=ONE, total=total, span=2)
    assert sum(made.values()) == total
    assert made[0] + made[1] == round(total / 2)


def test_of_each_pair_as_many_stay_as_on_average() -> None:
    # 0.5 and 1 of the first pair, twice 0.1 of the second.
    assert spend(cost, start=FOUR, lowest=ONE, total=12, span=2) == {0: 3, 1: 3, 2: 2, 3: 4}


def test_bounds_hold_and_the_rest_is_taken_elsewhere() -> None:
    lowest = {0: 4, 1: 3, 2: 1, 3: 1}
    assert spend(cost, start=FOUR, lowest=lowest, total=12, span=2) == {0: 4, 1: 3, 2: 1, 3: 4}
    with pytest.raises(BadConfig, match="8 experts cannot stay: what must stay is 9"):
        spend(cost, start=FOUR, lowest=lowest, total=8)
