"""The command line, called in this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from moekit.cli.main import main
from tests.commands import Done, Moekit


@pytest.fixture
def moekit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Moekit]:
    """Call the command line, on a terminal wide enough for its tables."""
    monkeypatch.setenv("COLUMNS", "200")
    before = signal.getsignal(signal.SIGTERM)

    def call(*args: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        assert isinstance(left.value.code, int)
        return Done(left.value.code, told.out, told.err)

    yield call
    signal.signal(signal.SIGTERM, before)
