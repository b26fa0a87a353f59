"""How far long work has come: bars on a terminal and in notebooks, lines in a log, a function of your own, or nothing.

moekit.prune(..., progress=None)    # a bar where someone looks: on a terminal or in a notebook
moekit.prune(..., progress=False)   # nothing
moekit.prune(..., progress=tell)    # tell(label, done, total, note) at every step
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from moekit._progress import Progress
from moekit.errors import printable

# What `progress=` of the functions of moekit takes.
ProgressLike = Progress | bool | Callable[[str, int, int | None, str], Any] | None

# Plain logs get a line at most this often, so that an hour of training does not fill a page a minute.
SECONDS_BETWEEN_LINES = 15.0
# Work that was done sooner is not worth a line.
SECONDS_WORTH_A_LINE = 1.0
# A notebook draws its output anew at most this often.
SECONDS_BETWEEN_DRAWINGS = 0.2


def progress_of(given: ProgressLike) -> Progress | None:
    """What shows progress, from what a caller gave.

    Args:
        given: None for a bar on a terminal or in a notebook and nothing elsewhere, True for a bar anywhere, False for
            nothing, a function `tell(label, done, total, note)`, or anything with `start`, `advance` and `finish`.
    """
    if given is False:
        return None
    if given is None or given is True:
        if in_notebook():
            return NotebookProgress()
        watched = sys.stderr.isatty() and not os.environ.get("CI")
        return RichProgress() if watched or given else None
    return given if isinstance(given, Progress) else CallbackProgress(given)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


class SilentProgress:
    """Says nothing."""

    def start(self, label: str, total: int | None) -> None:
        """Nothing."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class PlainProgress:
    """Lines such as `training: 120/300 loss 2.41 (40 s)`, for logs."""

    def __init__(
        self,
        stream: TextIO | None = None,
        seconds: float = SECONDS_BETWEEN_LINES,
        worth: float = SECONDS_WORTH_A_LINE,
    ) -> None:
        self._stream = stream or sys.stderr
        self._seconds = seconds
        self._worth = worth
        self._stack: list[dict[str, Any]] = []

    def start(self, label: str, total: int | None) -> None:
        """Begin a piece of work; pieces may be nested."""
        now = time.monotonic()
        self._stack.append({"label": label, "total": total, "done": 0, "note": "", "since": now, "told": now})

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count, and print a line where the last one is long ago."""
        if not self._stack:
            return
        work = self._stack[-1]
        work["done"] += amount
        work["note"] = note or work["note"]
        if time.monotonic() - work["told"] >= self._seconds:
            work["told"] = time.monotonic()
            self._line(work)

    def finish(self) -> None:
        """Print the last line of this piece, if it took a while."""
        if self._stack:
            work = self._stack.pop()
            if time.monotonic() - work["since"] >= self._worth:
                self._line(work)

    def _line(self, work: dict[str, Any]) -> None:
        total = f"/{work['total']}" if work["total"] is not None else ""
        note = f" {work['note']}" if work["note"] else ""
        seconds = time.monotonic() - work["since"]
        line = f"{work['label']}: {work['done']}{total}{note} ({seconds:.0f} s)"
        print(printable(line), file=self._stream, flush=True)


def _bars(**options: Any) -> Any:
    """Rich's bars, with our columns."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress as Bars,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        **options,
    )


class RichProgress:
    """Bars on a terminal that vanish when their work is done, leaving one line each."""

    def __init__(self) -> None:
        from rich.console import Console

        self._bars = _bars(console=Console(stderr=True), transient=False)
        self._tasks: list[Any] = []

    def start(self, label: str, total: int | None) -> None:
        """Add a bar; pieces may be nested."""
        if not self._tasks:
            self._open()
        self._tasks.append(self._bars.add_task(printable(label), total=total, note=""))

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Move the innermost bar on."""
        if not self._tasks:
            return
        fields: dict[str, Any] = {"note": printable(note)} if note else {}
        self._bars.update(self._tasks[-1], advance=amount, **fields)

    def finish(self) -> None:
        """End the innermost bar; the display closes with the outermost."""
        if not self._tasks:
            return
        task = self._tasks.pop()
        if self._bars.tasks and self._bars.tasks[-1].total is None:
            self._bars.update(task, total=self._bars.tasks[-1].completed)
        if not self._tasks:
            self._close()
            for shown in list(self._bars.task_ids):
                self._bars.remove_task(shown)

    def _open(self) -> None:
        self._bars.start()

    def _close(self) -> None:
        self._bars.stop()


class NotebookProgress(RichProgress):
    """The same bars in the output of a notebook's cell, drawn anew in their place."""

    def __init__(self) -> None:
        super().__init__()
        self._bars = _bars(auto_refresh=False)
        self._handle: Any = None
        self._drawn = 0.0

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Move the innermost bar on, and draw it where the last drawing is long enough ago."""
        super().advance(amount, note)
        if self._tasks and time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def _open(self) -> None:
        from IPython.display import display

        self._handle = display(self._bars, display_id=True)

    def _close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self._handle is not None:
            self._handle.update(self._bars)


class CallbackProgress:
    """Calls a function at every step.

    Args:
        tell: `tell(label, done, total, note)`; total is None where it is not known.
    """

    def __init__(self, tell: Callable[[str, int, int | None, str], Any]) -> None:
        self._tell = tell
        self._stack: list[tuple[str, int, int | None]] = []

    def start(self, label: str, total: int | None) -> None:
        """Say that a piece of work begins; pieces may be nested."""
        self._stack.append((label, 0, total))
        self._tell(label, 0, total, "")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Say how far the innermost piece is."""
        if self._stack:
            label, done, total = self._stack[-1]
            self._stack[-1] = (label, done + amount, total)
            self._tell(label, done + amount, total, note)

    def finish(self) -> None:
        """End the innermost piece."""
        if self._stack:
            self._stack.pop()
