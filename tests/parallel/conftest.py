"""Ranks for the tests of this folder, started by the first test that asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes with a gloo group."""
    ranks = Pool()
    yield ranks
    ranks.close()
