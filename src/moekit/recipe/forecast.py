"""What a recipe would do and how long that takes, before any step runs.

Steps read what others have yet to write, or what an older run with other inputs has left in the same folder: neither
can be opened for exact figures, so what they would need is unknown until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moekit.errors import MoekitError
from moekit.jobs.shared.estimates import ByteSizes, Item, JobEstimate
from moekit.recipe.runner import check, named, with_folders
from moekit.recipe.schema import Recipe
from moekit.recipe.steps import AnyStep
from moekit.recipe.variables import step_references


def estimate(recipe: Recipe) -> dict[str, JobEstimate]:
    """What each step would read, write and need, in order; nothing is read but file sizes and headers.

    Raises:
        MoekitError: a step would be refused for what it reads from outside; names it.
    """
    check(recipe)
    return {ready.id: told for ready, told in _forecast(recipe, ByteSizes())}


def durations(recipe: Recipe, *, done: bool = True) -> dict[str, float | None]:
    """Seconds that each step will take on this machine, about; None where nothing says so.

    Args:
        recipe: from `load_recipe`.
        done: name finished steps, too.

    Raises:
        MoekitError: as `estimate`.
    """
    from moekit.recipe.duration import durations as estimated
    from moekit.recipe.runner import read_marker

    sizes = ByteSizes()
    ready = {str(recipe.folder / step.id): step for step, _ in _forecast(recipe, sizes)}
    found = {step.id: seconds for step, seconds in zip(ready.values(), estimated(ready, sizes).values(), strict=True)}
    return {name: took for name, took in found.items() if done or read_marker(recipe.folder, name) is None}


def _forecast(recipe: Recipe, sizes: ByteSizes) -> Iterator[tuple[AnyStep, JobEstimate]]:
    """Each step with folders in the place of references, and its estimate; `sizes` learns what steps will write."""
    folders = {step.id: str(recipe.folder / step.id) for step in recipe.steps}
    before: list[str] = []
    for step in recipe.steps:
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
