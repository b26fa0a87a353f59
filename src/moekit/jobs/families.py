"""`use: families`: which Mixture-of-Experts families of the installed transformers work, tried on tiny models."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moekit._ranks import is_first_rank
from moekit.checkpoint import atomic_folder
from moekit.family import Family, discover, family
from moekit.jobs.call import JobResult, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, JobEstimate
from moekit.jobs.options.families import FamiliesOptions
from moekit.jobs.trials.cell import Cell
from moekit.jobs.trials.pair import Pair
from moekit.jobs.trials.trial import STEPS, try_family
from moekit.progress import ProgressLike

REPORT = "families.json"


class FamiliesResult(JobResult):
    """What works.

    Attributes:
        transformers: its version.
        steps: what was tried, in order.
        families: each with its name, class, cells (step -> state, message, when, seconds) and seconds.
    """

    transformers: str
    steps: list[str]
    families: list[dict[str, Any]]


def families(
    names: Sequence[str] = (),
    *,
    only: Literal["works", "refused", "failed"] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> FamiliesResult:
    """Try every Mixture-of-Experts family of the installed transformers on a tiny model, and say what works.

    A random model of a few hundred thousand weights is built by rules over the names of the config's fields, in a
    temporary folder; nothing is downloaded. Seconds a family.

    Args:
        names: model types, as configs say them; all by default.
        only: tell only of families where all works, where something is refused, or where something failed.
        out: folder of the report; None keeps nothing but the result.
        overwrite: replace what is there, at the very end.
        seed: of weights, and of everything random.
        progress: see `moekit.progress`.

    Returns:
        What `moekit families` prints.

    Raises:
        BadConfig: transformers has no language model of such a type, or it has no experts; or `out` exists.
    """
    return call(FamiliesOptions, FamiliesResult, dict(locals()))


def check(options: FamiliesOptions) -> None:
    """Refuse names that transformers does not have."""
    for name in options.names:
        family(name)


def estimate(options: FamiliesOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Tiny models, one at a time."""
    return JobEstimate((), (), disk=64 << 20, memory=1 << 30, notes=("some ten seconds a family on one core",))


def run(options: FamiliesOptions, context: JobContext) -> dict[str, Any]:
    """Try them one after another."""
    import transformers

    chosen = [family(name) for name in options.names] or discover()
    if context.progress is not None:
        context.progress.start("families", len(chosen))
    told = []
    with Pair() as pair:
        for entry in chosen:
            told.append(_row(entry, pair, context.seed))
            if context.progress is not None:
                context.progress.advance(1, note=entry.name)
    if context.progress is not None:
        context.progress.finish()
    rows = [row for row in told if options.only is None or verdict(row["cells"]) == options.only]
    found = {"transformers": transformers.__version__, "steps": list(STEPS), "families": rows}
    if is_first_rank():
        with atomic_folder(context.out, overwrite=context.overwrite) as folder:
            (folder / REPORT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _row(entry: Family, pair: Pair, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    cells = {name: cell.model_dump(mode="json") for name, cell in try_family(entry, pair, seed).items()}
    return {
        "name": entry.name,
        "class": entry.architecture,
        "cells": cells,
        "seconds": round(time.monotonic() - start, 1),
    }


def verdict(cells: dict[str, Any]) -> Literal["works", "refused", "failed"]:
    """A family by the worst of its cells."""
    states = {Cell.model_validate(cell).state for cell in cells.values()}
    if "failed" in states:
        return "failed"
    return "refused" if "refused" in states else "works"
