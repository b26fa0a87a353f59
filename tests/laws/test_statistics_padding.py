"""Law: padding changes no statistic."""

from __future__ import annotations

from functools import cache

import pytest

from moekit.trace.statistics import Statistics
from tests.laws.recorded import CASES, batch, close, traced


@cache
def recorded(family: str, padded: int) -> Statistics:
    found = traced(family, [batch([0, 1], cut=6, padded=padded), batch([2, 3])]).statistics
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_padding_does_not_count(family: str, name: str) -> None:
    for layer, stats in recorded(family, 0).items():
        assert stats.tokens == recorded(family, 3)[layer].tokens == 30
        close(name, stats, recorded(family, 3)[layer])
