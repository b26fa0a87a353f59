"""Progress as the place wants it: bars on a terminal, plain lines in a log, nothing where it was asked for."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from moekit.errors import printable

# Plain logs get a line at most this often, so that an hour of training does not fill a page a minute.
SECONDS_BETWEEN_LINES = 15.0
# Work that was done sooner is not worth a line.
SECONDS_WORTH_A_LINE = 1.0


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


class RichProgress:
    """Bars that vanish when their work is done, leaving one line each."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=False,
        )
        self._tasks: list[Any] = []

    def start(self, label: str, total: int | None) -> None:
        """Add a bar; pieces may be nested."""
        if not self._tasks:
            self._bars.start()
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
            self._bars.stop()
            for shown in list(self._bars.task_ids):
                self._bars.remove_task(shown)
