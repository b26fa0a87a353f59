"""Written, checked, and only then called by its name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moekit.checking import CheckReport, check
from moekit.checkpoint import atomic_folder
from moekit.jobs.context import JobContext

logger = logging.getLogger(__name__)

# An expert that can only answer zero.
DEAD = "dead-expert"

Written = TypeVar("Written")


def write_checked(
    context: JobContext, write: Callable[[Path], Written], *, most: int | None = None
) -> tuple[Written, CheckReport]:
    """Write a model, check it, and give it its name if nothing is wrong with it.

    An expert that can only answer zero is no fault of the writing, which has just taken the digests: it was so in
    the source, right after a conversion, or training chose it for no token. It is told, and stays.

    Args:
        context: where to, whether that may be replaced, and who is told how far it is.
        write: writes into the folder that it is given, which is not there yet.
        most: how many warnings to log one by one; None for all.

    Returns:
        What `write` returned, and what the check found.

    Raises:
        BadCheckpoint: what was written is not what it must be; nothing is left.
    """
    with atomic_folder(context.out, overwrite=context.overwrite) as folder:
        inner = folder / context.out.name
        made = write(inner)
        report = _named(check(inner, progress=context.progress), inner, context.out)
        sound = [finding for finding in report.findings if finding.code != DEAD]
        report.model_copy(update={"findings": sound}).raise_if_bad()
        for written in list(inner.iterdir()):
            written.rename(folder / written.name)
        inner.rmdir()
    _log_warnings(report, context.out, most)
    return made, report


def _named(report: CheckReport, written: Path, out: Path) -> CheckReport:
    """What was found, told of the folder that stays."""
    findings = [
        finding
        if finding.file is None
        else finding.model_copy(update={"file": finding.file.replace(str(written), str(out), 1)})
        for finding in report.findings
    ]
    return report.model_copy(update={"findings": findings, "folder": str(out)})


def _log_warnings(report: CheckReport, out: Path, most: int | None) -> None:
    warnings = [f for f in report.findings if f.severity == "warning" and f.code != DEAD]
    for finding in warnings[:most]:
        place = "" if finding.layer is None else f"layer {finding.layer}: "
        logger.warning("%s: %s%s", out, place, finding.message)
    if most is not None and len(warnings) > most:
        logger.warning("%s: and %d more; see moekit check", out, len(warnings) - most)
