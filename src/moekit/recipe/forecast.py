"""What a recipe would do and how long that takes, before any step runs.

Steps read what others have yet to write, or what an older run with other inputs has left in the same folder: neither
can be opened for exact figures, so what they would need is unknown until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moekit.errors import MoekitError
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.recipe.runner import Marker, check, chosen, finished, named, read_marker, step_key, with_folders
from moekit.recipe.schema import Recipe
from moekit.recipe.steps import AnyStep
from moekit.recipe.variables import matching, step_references


def left(recipe: Recipe, *, until: str | None = None, again: frozenset[str] = frozenset()) -> list[str]:
    """Ids of the steps that a run would carry out, in order.

    A step that reads what another one will write anew counts as left, though it stands if that writes the same bytes;
    one that is only run again is taken to write them.

    Args:
        recipe: from `load_recipe`.
        until: stop after this step.
        again: steps to run even if they are finished.

    Raises:
        BadConfig: the recipe has no such step.
    """
    steps = chosen(recipe, until, again)
    folders = {step.id: str(recipe.folder / step.id) for step in recipe.steps}
    done: dict[str, Marker] = {}
    found: list[str] = []
    for number, step in enumerate(steps):
        before = [known.id for known in steps[:number]]
        marker = None
        used = {name for reference in step_references(step.model_dump()) for name in matching(reference, before)}
        # Inputs are hashed only where there is a marker to compare with.
        if used <= done.keys() and read_marker(recipe.folder, step.id) is not None:
            key = step_key(recipe, step, with_folders(step, folders, before), done)
            marker = finished(recipe.folder, step.id, key)
        if marker is not None:
            done[step.id] = marker
        if marker is None or step.id in again:
            found.append(step.id)
    return found


def estimate(recipe: Recipe, *, until: str | None = None) -> dict[str, JobEstimate]:
    """What each step would read, write and need, in order; nothing is read but file sizes and headers.

    Args:
        recipe: from `load_recipe`.
        until: stop after this step.

    Raises:
        BadConfig: the recipe has no such step, or an option is impossible; names the step.
        MoekitError: a step would be refused for what it reads from outside; names it.
    """
    check(recipe)
    return {ready.id: told for ready, told in _forecast(recipe, until, ByteSizes())}


def durations(recipe: Recipe, *, until: str | None = None) -> dict[str, float | None]:
    """Seconds that each step takes on this machine, about; None where nothing says so.

    Args:
        recipe: from `load_recipe`.
        until: stop after this step.

    Raises:
        MoekitError: as `estimate`.
    """
    from moekit.recipe.duration import durations as estimated

    sizes = ByteSizes()
    ready = {str(recipe.folder / step.id): step for step, _ in _forecast(recipe, until, sizes)}
    return {step.id: seconds for step, seconds in zip(ready.values(), estimated(ready, sizes).values(), strict=True)}


def _forecast(recipe: Recipe, until: str | None, sizes: ByteSizes) -> Iterator[tuple[AnyStep, JobEstimate]]:
    """Each step with folders in the place of references, and its estimate; `sizes` learns what steps will write."""
    folders = {step.id: str(recipe.folder / step.id) for step in recipe.steps}
    before: list[str] = []
    for step in chosen(recipe, until):
        ready = with_folders(step, folders, before=before)
        told = _of_step(step, ready, Path(folders[step.id]), sizes)
        sizes.expect(told)
        before.append(step.id)
        yield ready, told


def _of_step(step: AnyStep, ready: AnyStep, out: Path, sizes: ByteSizes) -> JobEstimate:
    try:
        with named(step.id):
            return ready.estimate(out, sizes)
    except MoekitError as error:
        if not step_references(step.model_dump()):
            raise
        reads = tuple(sizes.item(reference) for _, reference in ready.inputs())
        note = f"unknown until the steps before it have run ({error.message})"
        return JobEstimate(reads, (Item(str(out), None),), notes=(note,))
