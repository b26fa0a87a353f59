"""What every command gets: the common options, a place to print, progress, and a way to answer in JSON."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit._ranks import is_first_rank
from moekit.errors import printable
from moekit.progress import PlainProgress, RichProgress, SilentProgress

PIPE_WIDTH = 160

if TYPE_CHECKING:
    from rich.console import Console

    from moekit._progress import Progress
    from moekit.jobs.estimates import JobEstimate


@dataclass
class Terminal:
    """The common options of one call and where its answers go.

    Tables and sentences go to stdout, or with `--json` one object instead; progress, warnings and errors to stderr.
    """

    dry_run: bool = False
    json: bool = False
    seed: int = 0
    seed_given: bool = False
    quiet: bool = False
    debug: bool = False
    home: Path | None = None
    _answer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Under torchrun every rank runs this; one speaks.
        self.quiet = self.quiet or not is_first_rank()
        if self.home is not None:
            os.environ["MOEKIT_HOME"] = str(self.home.expanduser().resolve())
        if not self.on_terminal:
            # The bars of libraries under us would fill a log; ours print plain lines there.
            os.environ.setdefault("TQDM_DISABLE", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    @property
    def command(self) -> str:
        """The command line as it was given, for records."""
        return shlex.join(["moekit", *sys.argv[1:]])

    @property
    def on_terminal(self) -> bool:
        """Whether a person is watching."""
        return sys.stderr.isatty() and not self.quiet and not os.environ.get("CI")

    @property
    def progress(self) -> Progress:
        """Bars on a terminal, nothing with --quiet or in CI, plain lines otherwise."""
        if self.quiet or os.environ.get("CI"):
            return SilentProgress()
        return RichProgress() if self.on_terminal else PlainProgress()

    @property
    def console(self) -> Console:
        """Stdout, as rich sees it; plain where it is not a terminal."""
        from rich.console import Console

        # A file or a pipe has no width: 80 columns would fold tables that nobody needs folded.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
        return Console(width=width, highlight=False, quiet=self.json)

    def say(self, text: str = "") -> None:
        """Print a sentence that is part of the answer."""
        if not self.json and not self.quiet:
            print(printable(text))

    def note(self, text: str) -> None:
        """Print on stderr what happens meanwhile."""
        if not self.quiet and not self.json:
            print(printable(text), file=sys.stderr)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print a table; numbers stand to the right, and a narrow terminal gets it in parts."""
        from moekit.cli._tables import print_table

        if self.json or self.quiet:
            return
        body = [[_cell(value) for value in row] for row in rows]
        numeric = [bool(body) and all(_is_number(row[c]) for row in body) for c in range(len(columns))]
        print_table(self.console, title, columns, body, numeric)

    def answer(self, **values: Any) -> None:
        """Add to the object that --json prints."""
        self._answer.update(values)

    def estimate(self, estimate: JobEstimate) -> None:
        """Print what a command would read, write and need."""
        for title, items in (("reads", estimate.reads), ("writes", estimate.writes)):
            for item in items:
                self.say(f"{title:7} {item.what}  {size(item.nbytes)}")
        self.say(f"disk    {size(estimate.disk)} at most while it runs")
        self.say(f"memory  {size(estimate.memory)} about")
        for line in estimate.notes:
            self.say(f"note    {line}")
        self.answer(dry_run=True, **estimate.as_dict())

    def close(self) -> None:
        """Print the JSON answer, if it was asked for."""
        if self.json and is_first_rank():
            print(json.dumps(self._answer, default=_plain, indent=2 if sys.stdout.isatty() else None))


def size(nbytes: int | None) -> str:
    """Bytes for a reader: `1.5 GiB`."""
    if nbytes is None:
        return "unknown size"
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else printable(str(value))


def _is_number(text: str) -> bool:
    return (
        text == "-"
        or text.replace(",", "").replace(".", "").replace("-", "").replace("e", "").replace("+", "").isdigit()
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
