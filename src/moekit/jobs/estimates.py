"""What a step or a whole recipe would do: what it reads, what it writes, and the bytes it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Item:
    """Something read or written.

    Attributes:
        what: a path, hub id or package.
        nbytes: its size; None where it cannot be known beforehand.
    """

    what: str
    nbytes: int | None = None


@dataclass(frozen=True)
class JobEstimate:
    """What a piece of work would read, write and need.

    Attributes:
        reads: inputs.
        writes: outputs, under their final names.
        disk: most bytes on disk at any time beyond what is there, or None if unknown.
        memory: peak bytes of memory beyond the libraries', or None if unknown.
        notes: anything else a user should know first.
    """

    reads: tuple[Item, ...] = ()
    writes: tuple[Item, ...] = ()
    disk: int | None = None
    memory: int | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "reads": [{"what": item.what, "bytes": item.nbytes} for item in self.reads],
            "writes": [{"what": item.what, "bytes": item.nbytes} for item in self.writes],
            "disk_bytes": self.disk,
            "memory_bytes": self.memory,
            "notes": list(self.notes),
        }


@dataclass
class ByteSizes:
    """Bytes of what is on disk, and of what earlier steps will have written."""

    expected: dict[str, int | None] = field(default_factory=dict)

    def of(self, path: str | Path) -> int | None:
        """Bytes of a file or folder: measured if it is there, else as estimated, else None."""
        measured = disk_bytes(path)
        if measured is not None:
            return measured
        text = str(path)
        if text in self.expected:
            return self.expected[text]
        # A file inside a folder that a step will write is at most the folder.
        parents = [name for name in self.expected if text.startswith(name.rstrip("/") + "/")]
        return self.expected[max(parents, key=len)] if parents else None

    def item(self, path: str | Path) -> Item:
        """The same as an item."""
        return Item(str(path), self.of(path))

    def expect(self, estimate: JobEstimate) -> None:
        """Remember what a step will write."""
        self.expected.update({item.what: item.nbytes for item in estimate.writes})


def disk_bytes(path: str | Path) -> int | None:
    """Bytes of a file, or of all files under a folder (links followed); None if nothing is there."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return None


def total(numbers: Iterable[int | None]) -> int | None:
    """Sum of those that are known; None if none is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def largest(numbers: Iterable[int | None]) -> int | None:
    """Largest of those that are known; None if none is."""
    return max((number for number in numbers if number is not None), default=None)


def _most_at_once(parts: Sequence[JobEstimate]) -> int | None:
    """Most bytes on disk while steps run one after the other: scratch files of a step go when it ends."""
    kept = 0
    most: int | None = None
    for part in parts:
        written = total(item.nbytes for item in part.writes) or 0
        most = max(most or 0, kept + max(part.disk or 0, written))
        kept += written
    return most


def merged(estimates: Mapping[str, JobEstimate]) -> JobEstimate:
    """One estimate of steps that run one after the other: outputs add up, memory does not."""
    parts = list(estimates.values())
    made = {item.what.rstrip("/") for part in parts for item in part.writes}
    outside: dict[str, Item] = {}
    for item in (item for part in parts for item in part.reads):
        if not any(item.what == name or item.what.startswith(name + "/") for name in made):
            outside[item.what] = item
    return JobEstimate(
        reads=tuple(outside.values()),
        writes=tuple(item for part in parts for item in part.writes),
        disk=_most_at_once(parts),
        memory=largest(part.memory for part in parts),
        notes=tuple(f"{name}: {note}" for name, part in estimates.items() for note in part.notes),
    )
