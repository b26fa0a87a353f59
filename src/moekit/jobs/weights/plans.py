"""Plans on disk as jobs write, name and find them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moekit.checkpoint import atomic_folder
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.plan_files import remove_plan
from moekit.errors import MoekitError

PLAN_FILE = "plan.json"
# At most, with the scores of all experts.
PLAN_BYTES = 16 << 20


def plan_path(reference: str) -> Path:
    """The file of a plan that a user names by itself, or by the folder that holds it."""
    path = Path(reference).expanduser()
    return path / PLAN_FILE if path.is_dir() else path


def save_plan(plan: WeightPlan, out: Path, *, overwrite: bool) -> None:
    """Write a plan to a `.json` file, or into a folder, whole or not at all."""
    if out.suffix == ".json":
        plan.save(out)
        return
    with atomic_folder(out, overwrite=overwrite) as folder:
        plan.save(folder / PLAN_FILE)


@contextmanager
def plan_beside(plan: WeightPlan, file: str | None, *, overwrite: bool) -> Iterator[None]:
    """A plan's file beside a model that is made meanwhile: a killed run finds it, and one that failed leaves none.

    A failed run leaves nothing that it could go on with; a file would only stop the same call from being made again.

    Args:
        plan: what was decided.
        file: where to; None writes none.
        overwrite: whether the file may be replaced, so that it is in nobody's way.
    """
    if file is None:
        yield
        return
    plan.save(file)
    try:
        yield
    except (MoekitError, OSError):
        if not overwrite:
            remove_plan(Path(file))
        raise


def known_plan(file: Path, trace: str, protected: Mapping[int, Collection[int]]) -> WeightPlan | None:
    """The plan that an interrupted run of the same work had come to.

    Args:
        file: where it would lie.
        trace: digest of what was measured.
        protected: decoder layer -> experts that stay.
    """
    try:
        plan = WeightPlan.load(file) if file.is_file() else None
    except MoekitError:
        return None
    if plan is None or plan.file.trace != trace or plan.file.protected != protected:
        return None
    return plan


def named(reference: str) -> str:
    """A text as a reader in another working folder finds it."""
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() else reference


def origin(data: str | None, *, apart: bool) -> str:
    """How a plan or report names its text: the part in brackets tells that the rest was kept apart for the proof.

    Args:
        data: the text.
        apart: whether a tenth of it was.
    """
    name = named(str(data))
    return f"{name}[train]" if apart else name
