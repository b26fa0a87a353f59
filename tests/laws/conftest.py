"""Parts of tests stand in the catalogue while a law runs."""

from __future__ import annotations

import pytest

from moekit import catalogue
from moekit.catalogue import method
from tests.parts import records


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the parts of `tests.parts` for one test."""
    catalogue.load_all()
    for key, record in records().items():
        monkeypatch.setitem(method._records, key, record)
