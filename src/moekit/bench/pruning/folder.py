"""The folder of a bench: what a bench wrote there is known by name, and nothing else is ever removed."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from moekit.bench.pruning.result import FILE, PruneBenchResult
from moekit.checkpoint.atomic import atomic_write
from moekit.errors import BadConfig, BadData

# What a bench keeps between calls, inside its folder.
WORK = "work"
MARKER = ".moekit-bench"
# Statistics, states, results and searches by the key of what they hold for, and what a killed process left of them.
_OWN = re.compile(r"\.?(trace|states|measured|search)-[0-9a-f]{16}(\.json)?(\.moekit-.+)?")


def mark(work: Path) -> None:
    """Say that a folder is a bench's, so that a later call knows it before there is a result."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / MARKER).is_file():
        atomic_write(work / MARKER, "what `moekit bench prune` keeps between calls\n")


def check_folder(out: Path) -> None:
    """Leave a folder that holds something else alone.

    Raises:
        BadConfig: it is no bench, and not empty.
    """
    if out.exists() and not out.is_dir():
        raise BadConfig("a file of this name is in the way", file=out, hint="choose another folder")
    if out.is_dir() and any(out.iterdir()) and not _is_bench(out):
        raise BadConfig("the folder holds something else than a bench", file=out, hint="choose another one")


def earlier_result(out: Path) -> PruneBenchResult | None:
    """What earlier calls found; None where there is nothing yet.

    Raises:
        BadData: the file is damaged.
    """
    return PruneBenchResult.load(out / FILE) if (out / FILE).is_file() else None


def forget(out: Path) -> None:
    """Remove the result, and of the work what a bench wrote."""
    work = out / WORK
    (out / FILE).unlink(missing_ok=True)
    for path in work.iterdir() if work.is_dir() else ():
        if not _OWN.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    mark(work)


def _is_bench(out: Path) -> bool:
    if (out / WORK / MARKER).is_file():
        return True
    with contextlib.suppress(BadData):
        return earlier_result(out) is not None
    return False
