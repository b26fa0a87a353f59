"""Where a step may not write: over what it reads."""

from __future__ import annotations

from pathlib import Path

from moekit.checkpoint.atomic import check_apart
from moekit.recipe.artefacts import local_parts
from moekit.recipe.steps.base import Step


def refuse_harm(step: Step, out: Path) -> None:
    """Refuse a step whose output would replace, hold or change something that it reads.

    Args:
        step: its inputs and further files.
        out: its folder or file.

    Raises:
        BadConfig: naming both.
    """
    for target in (out, *step.further_outputs()):
        for _, reference in step.inputs():
            for source in local_parts(reference):
                check_apart(target, source)
