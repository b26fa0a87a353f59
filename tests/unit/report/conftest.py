from __future__ import annotations

import pytest

from tests.unit.report.example import example


@pytest.fixture(scope="session")
def report():
    """A whole report of 4 layers and 16 experts."""
    return example(layers=4, experts=16)
