"""Law: how a text is split into batches changes no statistic."""

from __future__ import annotations

from functools import cache

import pytest

from moekit.trace.statistics import Statistics
from tests.laws.recorded import CASES, batch, close, traced, whole


@cache
def split(family: str) -> Statistics:
    found = traced(family, [batch([0]), batch([1, 2]), batch([3])]).statistics
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_batches_add_up(family: str, name: str) -> None:
    for layer, stats in whole(family).items():
        assert stats.tokens == split(family)[layer].tokens
        close(name, stats, split(family)[layer])
