"""Where a job works: its folder, its seed, whom it tells how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit._progress import Progress
from moekit.report.results import StepResult


@dataclass(frozen=True)
class LiveModel:
    """A model that is in memory already.

    Attributes:
        name: that tells it from others.
        model: the model.
        tokenizer: its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any


@dataclass
class JobContext:
    """Where a job works.

    Attributes:
        out: the folder it writes, under its final name; the job writes it whole or not at all.
        scratch: a folder of its own that survives a kill, for work that can resume; removed when the job is done.
        seed: of everything random in it.
        progress: told how far it is.
        command: what the record of a written checkpoint says made it.
        overwrite: whether `out` may be replaced.
        finished: steps of the same run that are done, by id.
        live: the model itself, where it is in memory already.
        kept: whether `out` stays when the job is done.
    """

    out: Path
    scratch: Path
    seed: int = 0
    progress: Progress | None = None
    command: str = ""
    overwrite: bool = True
    finished: Mapping[str, StepResult] = field(default_factory=dict)
    live: LiveModel | None = None
    kept: bool = True
