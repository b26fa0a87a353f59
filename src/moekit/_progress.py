"""The one protocol by which long work tells how far it is; `moekit.progress` draws it, libraries may pass their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Receives how far a piece of work has come."""

    def start(self, label: str, total: int | None) -> None:
        """A piece of work begins; `total` is None where its length is unknown."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """The current piece moved on; `note` is a short figure to show, such as a loss."""

    def finish(self) -> None:
        """The current piece ended."""


def track(items: Iterable[T], label: str, progress: Progress | None, total: int | None = None) -> Iterator[T]:
    """Iterate and report; without `progress` just iterate."""
    if progress is None:
        yield from items
        return
    progress.start(label, total if total is not None else (len(items) if isinstance(items, Sized) else None))
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.finish()
