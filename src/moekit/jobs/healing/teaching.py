"""What the teacher says: asked while training is on, or once before it, and always before of the held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from moekit import catalogue
from moekit.data import TokenBatches, vocabulary
from moekit.errors import BadConfig
from moekit.evaluation.closeness import Closeness, closeness
from moekit.jobs.context import JobContext
from moekit.jobs.healing.lesson import HeldOut, Lesson
from moekit.jobs.healing.proof import PARENT
from moekit.training import LiveTeacher, StoredTeacher, store_teacher
from moekit.training.healing import HealConfig
from moekit.training.objectives.kd import Distillation
from moekit.training.same_path import check_same_path
from moekit.training.teacher import Teacher
from moekit.training.teacher_store import text_hash

# Folders of the stores below that of a cache, by what they are of.
LEARNT, HELD_OUT = "train", "heldout"
# Likeliest tokens of the parent that the proof tells apart, whatever the loss does.
_PROOF_TOP = 64


@dataclass(frozen=True, eq=False)
class Taught:
    """What is known of the teacher once it has been asked.

    Attributes:
        teacher: of the text that is learnt from; None where only the text itself teaches.
        parent: the teacher on held-out text; None without a proof.
        heldout: what it says of that text.
        self_divergence: of the teacher from itself, through the path of its student: nats a token.
    """

    teacher: Teacher | None
    parent: Closeness | None
    heldout: StoredTeacher | None
    self_divergence: float | None


def ask_teacher(
    open_teacher: Callable[[], PreTrainedModel],
    lesson: Lesson,
    settings: HealConfig,
    context: JobContext,
    cache: Path | None,
) -> Taught:
    """Ask the teacher what is needed of it before the student is there; with a cache it is not needed any more.

    Args:
        open_teacher: loads it.
        lesson: texts and settings of the run.
        settings: of the healing.
        context: scratch folder and progress.
        cache: folder that its output is kept in; None asks it while training is on.

    Raises:
        BadConfig: the cache holds another text's, another teacher's or another number of tokens.
        BadData: the teacher, put through the path of its student, is not itself.
    """
    model = open_teacher()
    teacher: Teacher | None = None
    apart: float | None = None
    if settings.kl_weight > 0:
        if cache is None:
            teacher = LiveTeacher(model)
        else:
            teacher = _store(model, lesson.rows, cache / LEARNT, settings.top_k, lesson.config.batch, context)
        apart = check_same_path(model, teacher, lesson.rows, _objective(settings))
    parent, said = None, None
    if lesson.heldout is not None:
        said, parent = _measure(model, lesson.heldout, lesson.config.batch, context, cache)
    return Taught(teacher, parent, said, apart)


def _objective(settings: HealConfig) -> Distillation:
    made: Distillation = catalogue.make("objective", "kd", settings.objectives()["kd"])
    return made


def _measure(
    model: PreTrainedModel, heldout: HeldOut, batch: int, context: JobContext, cache: Path | None
) -> tuple[StoredTeacher, Closeness]:
    # A cache may serve runs that are proved on different texts.
    folder = (cache or context.scratch) / f"{HELD_OUT}-{text_hash(heldout.rows)[:12]}"
    said = _store(model, heldout.rows, folder, _PROOF_TOP, batch, context)
    return said, closeness(model, heldout.rows, said, batch=batch, name=PARENT, progress=context.progress)


def _store(
    model: PreTrainedModel, rows: TokenBatches, folder: Path, top_k: int, batch: int, context: JobContext
) -> StoredTeacher:
    kept = min(top_k, vocabulary.output_size(model))
    return store_teacher(model, rows, folder, top_k=kept, batch=batch, progress=context.progress)


def check_cache(settings: HealConfig) -> None:
    """Refuse a loss for which a store does not keep enough.

    Raises:
        BadConfig: naming the setting.
    """
    if settings.kl_weight == 0:
        raise BadConfig("there is a cache for the teacher, but kl_weight is 0: it is not asked", hint="leave one out")
    if settings.loss == "full":
        raise BadConfig(
            "loss full needs the teacher's whole distribution, of which a cache keeps the likeliest tokens",
            hint="say --loss bucket, or leave --teacher-cache out",
        )
    if settings.temperature != 1 and settings.loss == "bucket":
        raise BadConfig(
            f"temperature {settings.temperature:g} cannot be had of a cache: the mass of what is not kept is known at "
            "1 only",
            hint="leave --temperature or --teacher-cache out, or say --loss listed",
        )
