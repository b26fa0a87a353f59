"""Law: a model whose experts stand in another order has the same statistics in that order."""

from __future__ import annotations

from functools import cache

import pytest

from moekit.anatomy import find_moe_layers
from moekit.anatomy.permute import permute_experts
from moekit.trace import record
from moekit.trace.statistics import LayerStatistics, Statistics
from tests.laws.recorded import CASES, batch, close, fresh, get, names, permuted, whole

# Groups of two stay together, as a router that limits groups needs them.
ORDER = [5, 4, 0, 1, 7, 6, 2, 3]


@cache
def moved(family: str) -> Statistics:
    other = fresh(family)
    permute_experts(other, {layer.index: ORDER for layer in find_moe_layers(other)})
    found = record(other, [batch(range(4))], statistics=names(family)).statistics
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_statistics_follow_the_experts(family: str, name: str) -> None:
    for layer, stats in whole(family).items():
        expected = permuted(get(name), stats[name], ORDER)
        close(name, LayerStatistics(8, 32, values={name: expected}), moved(family)[layer])
