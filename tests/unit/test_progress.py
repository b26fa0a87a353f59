"""Progress in a log, and nowhere."""

from __future__ import annotations

import io

from moekit._progress import track
from moekit.progress import PlainProgress, RichProgress, SilentProgress


def test_plain_lines_say_how_far() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, seconds=0.0, worth=0.0)
    progress.start("training", 2)
    progress.advance(note="loss 2.5")
    progress.advance()
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("training: 1/2 loss 2.5")
    assert lines[-1].startswith("training: 2/2 loss 2.5")


def test_a_slow_clock_gets_one_line_at_the_end() -> None:
    stream = io.StringIO()
    assert list(track(range(3), "reading", PlainProgress(stream, worth=0.0))) == [0, 1, 2]
    assert stream.getvalue().splitlines() == ["reading: 3/3 (0 s)"]


def test_what_is_done_at_once_gets_no_line() -> None:
    stream = io.StringIO()
    assert list(track(range(3), "reading", PlainProgress(stream))) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_nested_work_and_stray_calls() -> None:
    for progress in (PlainProgress(io.StringIO()), RichProgress(), SilentProgress()):
        progress.advance()
        progress.finish()
        progress.start("outer", None)
        progress.start("inner", 1)
        progress.advance(note="x")
        progress.finish()
        progress.advance()
        progress.finish()
