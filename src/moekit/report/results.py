"""Files that steps write for other steps, by name, and how they are read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit._validation import MAX_ARTEFACT_BYTES, parse_file
from moekit.checkpoint.strictjson import read_json
from moekit.errors import BadCheckpoint, BadData

if TYPE_CHECKING:
    from moekit.evaluation import Comparison, Evaluation
    from moekit.evaluation.super_expert_study import SuperExpertStudy


@dataclass(frozen=True)
class StepResult:
    """A step of a run that is done.

    Attributes:
        id: its name in the recipe.
        use: what it did.
        folder: what it wrote.
        config: its settings.
        results: figures it returned.
    """

    id: str
    use: str
    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]


EVALUATION = "evaluation.json"
COMPARISON = "comparison.json"
REPLAY = "replay.json"


def placement_file(devices: int) -> str:
    """Name of the placement for D devices in a place step's folder."""
    return f"placement-{devices}.json"


def load_replay(folder: str | Path) -> dict[str, Any]:
    """Read the counts of a place step.

    Raises:
        BadData: nothing there, or damaged.
    """
    file = Path(folder) / REPLAY
    try:
        found = read_json(file, limit=MAX_ARTEFACT_BYTES)
        parts = [part["rows"][-1]["rows_per_token"] for part in found["devices"]]
    except (BadCheckpoint, LookupError, TypeError) as error:
        raise BadData("no placement results here", file=file, hint="`moekit place` writes them") from error
    if not parts:
        raise BadData("the placement results are empty", file=file, hint="place on at least one number of devices")
    return dict(found)


def load_evaluation(folder: str | Path) -> Evaluation:
    """Read what an evaluate step measured.

    Raises:
        BadData: nothing there, or damaged.
    """
    from moekit.evaluation import Evaluation

    file = Path(folder)
    file = file / EVALUATION if file.is_dir() else file
    hint = "`moekit evaluate` writes one"
    return parse_file(Evaluation, file, what="evaluation", missing=hint, hint=hint)


def load_comparison(folder: str | Path) -> Comparison:
    """Read how an evaluate step compares with its baseline.

    Raises:
        BadData: nothing there, or damaged.
    """
    from moekit.evaluation import Comparison

    file = Path(folder) / COMPARISON
    hint = "give the evaluate step a baseline"
    return parse_file(Comparison, file, what="comparison", missing=hint, hint=hint)


def load_studies(named: Sequence[str], finished: Iterable[StepResult]) -> dict[str, SuperExpertStudy]:
    """Name of a step -> its study of super experts: those named, then all others of the run.

    Args:
        named: folders of super-experts steps.
        finished: steps of the run that are done.

    Raises:
        BadData: nothing there, or damaged.
    """
    from moekit.evaluation.super_expert_study import KIND, SuperExpertStudy

    folders = {Path(folder).name: Path(folder) for folder in named}
    known = {folder.resolve() for folder in folders.values()}
    folders |= {d.id: d.folder for d in finished if d.use == KIND and d.folder.resolve() not in known}
    return {name: SuperExpertStudy.load(folder) for name, folder in folders.items()}
