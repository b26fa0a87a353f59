"""Law: statistics of two traces merged are those of one trace over both texts."""

from __future__ import annotations

from functools import cache

import pytest

from moekit.trace import Trace
from moekit.trace.statistics import Statistics
from tests.laws.recorded import CASES, batch, close, traced, whole


@cache
def merged(family: str) -> Statistics:
    parts = [traced(family, [batch(rows)], keep_choices=False) for rows in ([0, 1], [2, 3])]
    found = Trace.merge(parts).statistics
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_two_traces_are_one(family: str, name: str) -> None:
    for layer, stats in whole(family).items():
        assert stats.tokens == merged(family)[layer].tokens
        close(name, stats, merged(family)[layer])
