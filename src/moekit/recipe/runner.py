"""Carry out a recipe: finished steps are skipped, a killed run goes on where it was.

A step is finished when its marker under `.steps/` says so, was written for the same key (its config, the hashes of all
it reads, the version of moekit), and its output is still as it was written. A step's output carries its final name only
when it is whole; the marker comes after it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from moekit import __version__
from moekit._files import read_text, require_own_folder
from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_write, lock
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.context import JobContext
from moekit.jobs.shared.hashes import artefact_hash, hash_of, listing, reference_hash
from moekit.jobs.shared.outputs import check_output
from moekit.recipe.schema import Recipe
from moekit.recipe.steps import AnyStep
from moekit.recipe.variables import matching, resolve_steps, step_references
from moekit.report.results import StepResult

MARKERS = ".steps"
SCRATCH = ".scratch"
RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"

Event = Literal["skipped", "started", "finished"]


@dataclass(frozen=True)
class Marker:
    """What is written when a step is finished.

    Attributes:
        id: the step's name.
        use: what it did.
        key: hash of all it depended on.
        config: its settings, references replaced by folders.
        output: hash of its output folder; "" if it writes none.
        files: names and sizes in it.
        results: figures it returned.
        seconds: time it took.
        moekit: version.
    """

    id: str
    use: str
    key: str
    config: dict[str, Any]
    output: str
    files: list[list[Any]]
    results: dict[str, Any]
    seconds: float
    moekit: str = __version__


@dataclass
class RunResult:
    """What happened.

    Attributes:
        folder: the run folder.
        done: markers of all steps in order.
        ran: ids of the steps that were carried out now; the others were finished before.
    """

    folder: Path
    done: dict[str, Marker] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)


def check(recipe: Recipe) -> None:
    """Refuse impossible options of any step before the first one runs.

    Raises:
        BadConfig: naming the step and the option.
    """
    for step in recipe.steps:
        with named(step.id):
            step.check()


@contextmanager
def named(step: str) -> Iterator[None]:
    """Put the step's name into the message of whatever it raises."""
    try:
        yield
    except MoekitError as error:
        error.message = f"step {step!r}: {error.message}"
        raise


def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    again: frozenset[str] = frozenset(),
    progress: Progress | None = None,
    tell: Callable[[Event, str, Marker | None], None] | None = None,
) -> RunResult:
    """Carry out a recipe.

    Args:
        recipe: from `load_recipe`.
        until: stop after this step.
        again: steps to run even if they are finished.
        progress: handed to the steps.
        tell: called with "skipped", "started" or "finished", the step's id, and its marker.

    Raises:
        BadConfig: the run folder is in use, or a step of that name does not exist.
        MoekitError: whatever a step raises, with its name in the message; later steps are not run.
    """
    steps = chosen(recipe, until, again)
    ids = [step.id for step in recipe.steps]
    check(recipe)
    tell = tell or (lambda event, name, marker: None)
    folder = recipe.folder
    result = RunResult(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        _write_recipe(folder, recipe)
        for step in steps:
            ready = with_folders(step, {name: str(folder / name) for name in ids}, before=list(result.done))
            key = step_key(recipe, step, ready, result.done)
            marker = None if step.id in again else finished(folder, step.id, key)
            if marker is not None:
                tell("skipped", step.id, marker)
            else:
                tell("started", step.id, None)
                marker = _carry_out(recipe, ready, key, result.done, progress)
                result.ran.append(step.id)
                tell("finished", step.id, marker)
            result.done[step.id] = marker
            _write(folder / RUN_FILE, _summary(recipe, result))
    return result


def chosen(recipe: Recipe, until: str | None, again: frozenset[str] = frozenset()) -> list[AnyStep]:
    """The steps up to one of them.

    Args:
        recipe: from `load_recipe`.
        until: the last; None for all.
        again: steps that are to run even if they are finished.

    Raises:
        BadConfig: the recipe has no step of such a name.
    """
    ids = [step.id for step in recipe.steps]
    for name in {until, *again} - {None}:
        if name not in ids:
            raise BadConfig(f"the recipe has no step {name!r}", hint=f"it has: {', '.join(ids)}")
    return list(recipe.steps if until is None else recipe.steps[: ids.index(until) + 1])


def step_key(recipe: Recipe, step: AnyStep, ready: AnyStep, done: Mapping[str, Marker]) -> str:
    """Hash of all that a step's result depends on.

    Args:
        recipe: for its seed.
        step: as written, with references to steps.
        ready: with folders in their place.
        done: markers of the steps before it.
    """
    used = [name for reference in step_references(step.model_dump()) for name in matching(reference, done)]
    inside = {str(recipe.folder / name) for name in used}
    outside = {
        value: reference_hash(value)
        for _, value in ready.inputs()
        if not any(value == root or value.startswith(root + "/") for root in inside)
    }
    config = step.model_dump(mode="json", exclude={"id", "seed"})
    seed = recipe.seed if step.seed is None else step.seed
    before = sorted((name, done[name].key, done[name].output) for name in used)
    return hash_of([config, seed, before, outside, __version__])


def with_folders(step: AnyStep, folders: Mapping[str, str], before: list[str]) -> AnyStep:
    """The step with `${steps.ID}` replaced by folders.

    Args:
        step: as written.
        folders: id -> folder.
        before: ids of the steps that come before it.
    """
    known = {name: folders[name] for name in before}
    return type(step).model_validate(resolve_steps(step.model_dump(), known))


def _carry_out(
    recipe: Recipe, step: AnyStep, key: str, done: Mapping[str, Marker], progress: Progress | None
) -> Marker:
    folder = recipe.folder
    with named(step.id):
        check_output(step, folder / step.id)
    marker_file = folder / MARKERS / f"{step.id}.json"
    marker_file.unlink(missing_ok=True)
    scratch = folder / SCRATCH / f"{step.id}-{key[:16]}"
    for stale in (folder / SCRATCH).glob(f"{step.id}-" + "?" * 16):
        if stale != scratch:
            shutil.rmtree(stale, ignore_errors=True)
    require_own_folder(folder / SCRATCH)
    scratch.mkdir(parents=True, exist_ok=True)
    out = folder / step.id
    work = JobContext(
        out=out,
        scratch=scratch,
        seed=recipe.seed if step.seed is None else step.seed,
        progress=progress,
        command=f"moekit run {recipe.name}: {step.id}",
        finished={m.id: StepResult(m.id, m.use, folder / m.id, m.config, m.results) for m in done.values()},
    )
    started = time.monotonic()
    with named(step.id):
        results = step.run(work)
    marker = Marker(
        id=step.id,
        use=step.use,
        key=key,
        config=step.model_dump(mode="json"),
        output=artefact_hash(out) or "",
        files=listing(out) if out.exists() else [],
        results=_finite(results),
        seconds=round(time.monotonic() - started, 3),
    )
    _write(marker_file, asdict(marker))
    shutil.rmtree(scratch, ignore_errors=True)
    return marker


def finished(folder: Path, name: str, key: str) -> Marker | None:
    """The marker of a finished step; None if it never ran, for other inputs, or its output is gone or changed.

    Args:
        folder: of the run.
        name: of the step.
        key: what `step_key` gives now.
    """
    marker = read_marker(folder, name)
    if marker is None or marker.key != key:
        return None
    out = folder / name
    present = listing(out) if out.exists() else []
    return marker if present == marker.files else None


def read_marker(folder: Path, name: str) -> Marker | None:
    """Read a step's marker; None if there is none, or it is of another version of this file."""
    try:
        return Marker(**json.loads(read_text(folder / MARKERS / f"{name}.json")))
    except (OSError, ValueError, TypeError):
        return None


def _summary(recipe: Recipe, result: RunResult) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "about": recipe.about,
        "vars": recipe.vars,
        "seed": recipe.seed,
        "moekit": __version__,
        "steps": [asdict(marker) for marker in result.done.values()],
    }


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    atomic_write(folder / RECIPE_FILE, "# What ran here, with all variables filled in.\n" + text)


def _write(file: Path, value: Any) -> None:
    atomic_write(file, json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """Plain values with NaN and infinities as null: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
