"""A trace, with all that can be done to a whole one: read, write, merge, select."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from moekit.trace import combine, files
from moekit.trace.data import TraceData
from moekit.trace.meta import DataEntry, TraceMeta

__all__ = ["DataEntry", "Trace", "TraceMeta"]


class Trace(TraceData):
    """What routers chose on a text: see `TraceData` for what it holds."""

    def select(self, *, domain: str | None = None, document: int | None = None, phase: int | None = None) -> Trace:
        """The trace of some tokens only; statistics that choices do not tell are dropped.

        Raises:
            BadData: no such domain, or the trace kept statistics only.
        """
        return combine.select(self, domain=domain, document=document, phase=phase)

    @staticmethod
    def merge(traces: Sequence[Trace], *, documents: Literal["distinct", "shared"] = "distinct") -> Trace:
        """One trace of all tokens, in the order given; associative.

        Args:
            traces: of one model with one routing.
            documents: "distinct" numbers the documents of different traces apart (several runs); "shared" keeps the
                numbers (ranks that shared one text).

        Raises:
            BadData: none given, or of different models, layers, routings, tokenizers or statistics.
        """
        return combine.merge(traces, documents=documents)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the trace as a folder (`trace.json`, `trace.safetensors`), whole or not at all.

        Raises:
            BadConfig: the folder exists, or another process writes it.
            OutOfBudget: the disk is full.
        """
        files.save(self, Path(folder), overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> Trace:
        """Read a trace.

        Raises:
            BadData: not a trace, or damaged.
            UnsafeInput: a header that lies.
        """
        return files.load(Path(folder), cls)
