"""After a model was made to fit: it learns to answer as the one that it was made from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from moekit.compress.joint.profiles import profile_of
from moekit.errors import BadConfig
from moekit.jobs import heal
from moekit.jobs.context import JobContext
from moekit.jobs.options.fit import FitOptions
from moekit.jobs.options.heal import HealOptions

logger = logging.getLogger(__name__)


def unhealed_folder(options: FitOptions, out: Path) -> Path:
    """Where the model stands as it was before healing: what it was planned and measured as."""
    return (
        Path(options.unhealed).expanduser() if options.unhealed is not None else out.with_name(f"{out.name}-unhealed")
    )


def check_healing(options: FitOptions) -> None:
    """Refuse settings of a healing that is not asked for, or that would undo what was planned.

    Raises:
        BadConfig: see above.
    """
    if options.heal == "none":
        if options.heal_settings or options.unhealed is not None:
            raise BadConfig(
                "settings of a healing are given, but nothing heals", hint="say --heal router, or leave them out"
            )
        return
    if options.write == "plan":
        raise BadConfig("a plan alone is written, and nothing is there to heal", hint="say -o OUT, or leave --heal out")
    if options.heal not in ("router", "norms") and profile_of(options.engine).bits:
        raise BadConfig(
            f"weights of {options.heal} are rounded for {options.engine}, and what learns does not stay rounded",
            hint="say --heal router or norms",
        )
    heal.check(lesson_of(options, Path()))


def lesson_of(options: FitOptions, unhealed: Path) -> HealOptions:
    """The healing as a job of its own."""
    return HealOptions(
        model=str(unhealed),
        teacher=options.model,
        data=options.data,
        what=options.heal,
        settings=options.heal_settings,
        heldout=options.heldout if options.proof else None,
        proof=options.proof,
        proof_tokens=options.proof_tokens,
        window=options.window,
        bos=options.bos,
        device=options.device,
    )


def healed(options: FitOptions, unhealed: Path, context: JobContext) -> dict[str, Any]:
    """Heal what was written, into the job's folder; goes on where a killed run was.

    Returns:
        What the healing told.
    """
    logger.info("healing %s: what learns is %s", unhealed, options.heal)
    scratch = context.scratch / "healing"
    scratch.mkdir(parents=True, exist_ok=True)
    inner = JobContext(
        out=context.out,
        scratch=scratch,
        seed=context.seed,
        progress=context.progress,
        command=context.command,
        overwrite=context.overwrite,
    )
    return {"what": options.heal, "unhealed": str(unhealed), **heal.run(lesson_of(options, unhealed), inner)}
