"""The list of planted faults is tried against tests that pass without any."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "planted_faults.py"


@pytest.fixture
def planted() -> Any:
    spec = importlib.util.spec_from_file_location("planted_faults", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_a_test_that_fails_anyway_catches_nothing(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, ...]] = []

    def caught_by(folder: Path, tests: tuple[str, ...]) -> str:
        tried.append(tests)
        unchanged = (folder / "src" / "moekit" / planted.FAULTS[0].file).read_text()
        assert planted.FAULTS[0].right in unchanged
        return "tests/broken.py::test_always"

    monkeypatch.setattr(planted, "caught_by", caught_by)
    monkeypatch.setattr(sys, "argv", ["planted_faults.py", "--only", "gate and up", "router"])
    with pytest.raises(SystemExit, match="test_always fails without any fault"):
        planted.main()
    # All of their tests, each once.
    assert len(tried) == 1
    assert len(set(tried[0])) == len(tried[0]) > 2


def test_every_fault_still_has_its_line(planted: Any) -> None:
    for fault in planted.FAULTS:
        text = (FILE.parents[1] / "src" / "moekit" / fault.file).read_text()
        assert text.count(fault.right) == 1, fault.name
        assert all((FILE.parents[1] / where).exists() for where in fault.tests), fault.name
