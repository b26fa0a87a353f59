"""Where a step may not write: over what it reads."""

from __future__ import annotations

import os
from pathlib import Path

from moekit.errors import BadConfig
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
    sources = {Path(os.path.realpath(path)): path for _, reference in step.inputs() for path in local_parts(reference)}
    for target in (out, *step.further_outputs()):
        real = Path(os.path.realpath(target))
        for source, named in sources.items():
            if real == source or real in source.parents:
                raise BadConfig(
                    f"this would replace {named}, which is read", file=target, hint="choose another place to write to"
                )
            if source in real.parents:
                raise BadConfig(
                    f"this lies in {named}, which is read", file=target, hint="choose a place beside it to write to"
                )
