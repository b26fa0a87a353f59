"""Carry one job out, outside a recipe: for a command or a Python call."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moekit import __version__
from moekit._progress import Progress
from moekit._ranks import is_first_rank
from moekit._validation import faults
from moekit.checkpoint.atomic import lock
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import JobOptions
from moekit.jobs.shared.hashes import hash_of, reference_hash
from moekit.jobs.shared.outputs import refuse_harm

Options = TypeVar("Options", bound=JobOptions)


def options_from(cls: type[Options], values: Mapping[str, Any], *, hint: str) -> Options:
    """Options from what a user gave.

    Args:
        cls: the job's options.
        values: field -> value.
        hint: where to read what is allowed.

    Raises:
        BadConfig: unknown or impossible ones; names each with what was given.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise BadConfig(faults(error), hint=hint) from error


def ready(options: Options, out: Path | None, *, overwrite: bool = False) -> tuple[Options, Path, bool]:
    """Refuse what cannot work, before any work.

    Returns:
        What is to be done, where it is written, and whether that may be replaced.

    Raises:
        BadConfig: an option is impossible, or what would be written would harm what is read.
    """
    settled, target, replace = options.settled(out, overwrite)
    settled.check()
    refuse_harm(settled, target)
    return settled, target, replace


def perform(
    options: JobOptions,
    out: Path | None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> tuple[Path, dict[str, Any]]:
    """Do a job, and leave nothing beside `out` but what the same call can go on with.

    Args:
        options: what to do.
        out: what to write.
        seed: of everything random.
        overwrite: replace `out`, at the very end, if it is there.
        progress: told how far it is.
        command: what the record of a written checkpoint says made it.

    Returns:
        What was written, and the figures.

    Raises:
        BadConfig: an option is impossible, `out` exists, is read, or is being written by the same call.
    """
    options, target, replace = ready(options, out, overwrite=overwrite)
    if target.exists() and not replace and not (target.is_dir() and not any(target.iterdir())):
        what = "file" if target.is_file() else "folder"
        raise BadConfig(f"the {what} exists", file=target, hint="choose another one, or say --overwrite")
    context = JobContext(
        out=target,
        scratch=target.parent / f".{target.name}.scratch-{_key(options, seed)}",
        seed=seed,
        progress=progress,
        command=command,
        overwrite=replace,
    )
    with _alone(context):
        _refuse_further(options, context)
        return target, _run(options, context)


def _key(options: JobOptions, seed: int) -> str:
    """The same call on the same inputs finds the same scratch folder, so that work which can resume does."""
    inputs = [reference_hash(reference) for _, reference in options.inputs()]
    return hash_of([type(options).__name__, options.identity(), seed, inputs, __version__])[:16]


@contextmanager
def _alone(context: JobContext) -> Iterator[None]:
    """Two starts of one call would write into one scratch folder; the ranks of one start may."""
    if not is_first_rank():
        yield
        return
    context.out.parent.mkdir(parents=True, exist_ok=True)
    # Not the scratch folder itself: jobs may lock that for their own writers.
    with lock(context.scratch.with_name(f"{context.scratch.name}-start")):
        yield


def _refuse_further(options: JobOptions, context: JobContext) -> None:
    """Files beside `out` may be there only if an interrupted run of the same call wrote them."""
    if context.overwrite or context.scratch.exists():
        return
    for file in options.further_outputs():
        if file.exists():
            raise BadConfig("the file exists", file=file, hint="choose another one, or say --overwrite")


def _run(options: JobOptions, context: JobContext) -> dict[str, Any]:
    try:
        results = options.run(context)
    except MoekitError:
        if not any(context.scratch.glob("checkpoint-*")):
            shutil.rmtree(context.scratch, ignore_errors=True)
        raise
    if is_first_rank():
        shutil.rmtree(context.scratch, ignore_errors=True)
    return results
