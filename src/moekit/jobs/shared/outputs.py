"""Where a job may not write: over what it reads."""

from __future__ import annotations

from pathlib import Path

from moekit.checkpoint.atomic import check_apart
from moekit.jobs.options.base import JobOptions
from moekit.jobs.shared.hashes import local_parts


def refuse_harm(options: JobOptions, out: Path) -> None:
    """Refuse a job whose output would replace, hold or change something that it reads.

    Args:
        options: with inputs and further files.
        out: its folder or file.

    Raises:
        BadConfig: naming both.
    """
    for target in (out, *options.further_outputs()):
        for _, reference in options.inputs():
            for source in local_parts(reference):
                check_apart(target, source)
