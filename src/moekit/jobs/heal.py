"""`use: heal`: train a compressed model to answer as the one that it was made from, and prove what that brings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedModel

from moekit._validation import faults
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.atomic import check_apart
from moekit.data.encoding import Bos
from moekit.errors import BadConfig
from moekit.evaluation.closeness import Closeness, closeness
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate, total
from moekit.jobs.healing.changes import changed_tensors
from moekit.jobs.healing.lesson import Lesson, read_lesson
from moekit.jobs.healing.proof import HEALED, STUDENT, HealingProof, prove
from moekit.jobs.healing.sources import FINGERPRINT, TEACHER, Sources, local, open_sources
from moekit.jobs.healing.teaching import Taught, ask_teacher, check_cache
from moekit.jobs.healing.training import Healing, as_stored, check_parts, learn, open_student, train_control
from moekit.jobs.options.heal import HealOptions
from moekit.jobs.shared.adapters import check_adapter, place_adapter, settle_adapter
from moekit.jobs.shared.hashes import local_parts
from moekit.jobs.shared.inputs import changed_bytes, lies_here, model_item, open_model, text_item
from moekit.progress import ProgressLike
from moekit.training import TrainResult
from moekit.training.healing import HealConfig

logger = logging.getLogger(__name__)

_STAY = "--what router or norms leaves experts as they are"
# Bytes in memory for a byte on disk, which may be half of what a number takes: weights alone, or Adam's moments too.
_FEW_TRAIN, _MANY_TRAIN = 3, 8


class HealResult(JobResult):
    """What a healed model gained.

    Attributes:
        teacher: the model that it was held against.
        what: weights that learnt.
        steps: optimizer steps, of this process and those it continued.
        tokens: learnt from, padding left out.
        seconds: spent in steps.
        losses: of each step.
        trained: part -> parameters that learnt.
        parameters: of the model.
        changed: tensors that differ from the compressed model's, and their bytes.
        self_divergence: of the teacher from itself, through the path of its student: nats a token; None where it was
            not asked.
        precision: of matrix products.
        resumed_from: step that this process continued from.
        notes: what a reader of the figures must know.
        proof: parent, compressed and healed model on held-out text; None without.
    """

    teacher: str
    what: str
    steps: int
    tokens: int
    seconds: float
    losses: list[float]
    trained: dict[str, int]
    parameters: int
    changed: dict[str, Any]
    self_divergence: float | None
    precision: str
    resumed_from: int | None
    notes: list[str]
    proof: dict[str, Any] | None = None


def heal(
    model: str | Path,
    *,
    teacher: str | Path | None = None,
    data: TextLike,
    what: Literal["router", "experts", "lora", "norms", "all"] = "router",
    settings: Mapping[str, Any] | None = None,
    keep_adapter: str | Path | None = None,
    teacher_cache: str | Path | None = None,
    heldout: TextLike | None = None,
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    control: bool = False,
    bos: Bos = "auto",
    device: str = "auto",
    drop_unknown: bool = False,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> HealResult:
    """Train a few weights of a compressed model to answer as its parent does; a killed run resumes exactly.

    Args:
        model: compressed model: folder or hub id.
        teacher: model that it was made from: folder or hub id; by default the one its record names.
        data: text near the use: file, folder, source, mix or hub id.
        what: weights that learn; all others stay bit for bit as they are.
        settings: steps, lr, loss, lm, ...: `moekit.training.healing.HealConfig`.
        keep_adapter: also write the adapter, as peft and servers read it, to this folder; only with what "lora".
        teacher_cache: folder for the teacher's likeliest tokens: asked once, then gone from memory; kept for other
            runs.
        heldout: text to prove the result on; by default a tenth of data, which is kept apart for it.
        proof: measure parent, student and healed model on held-out text.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        control: also train the parent on the same steps, to tell what the text alone brings; only with `lm`.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: cpu, cuda, ..., or auto: a GPU if there is one.
        drop_unknown: leave out what the source holds beyond the model, such as extra layers.
        out: folder of the healed model.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit heal` prints.

    Raises:
        BadConfig: an impossible option, no teacher that fits, or `out` exists.
        BadData: a text is missing, empty or too short.
        BadCheckpoint: a model is damaged.
        UnsupportedModel: the student's weights are packed, or it has no Mixture of Experts.
        NumericFault: the loss became NaN; the last good weights are kept beside `out`.
    """
    return call(HealOptions, HealResult, dict(locals()))


def check(options: HealOptions) -> None:
    """Refuse impossible settings."""
    settings = config_of(options)
    if settings.lora is not None and options.what != "lora":
        raise BadConfig(f"lora is given, but {options.what} learns", hint="say --what lora, or leave it out")
    check_adapter(options.keep_adapter, learns=options.what == "lora", hint="say --what lora, or leave it out")
    if settings.weight_decay and options.what == "router":
        raise BadConfig("routers alone are never decayed: they would choose at random", hint="leave --weight-decay out")
    if options.teacher_cache is not None:
        check_cache(settings)
    if options.control and not options.proof:
        raise BadConfig("the control is part of the proof", hint="leave --no-proof or --control out")
    if options.control and settings.lm == 0:
        raise BadConfig(
            "held against itself the parent has nothing to learn, so the control is 0 without a run",
            hint="the control tells what the text alone brings: give --lm, or leave --control out",
        )
    if not options.proof and options.heldout is not None:
        raise BadConfig("a text to prove on is given, but no proof is wanted", hint="leave --heldout or --no-proof out")


def config_of(options: HealOptions) -> HealConfig:
    """The settings of the run.

    Raises:
        BadConfig: an unknown or impossible one.
    """
    try:
        return HealConfig(**options.settings)
    except ValidationError as error:
        raise BadConfig(f"healing: {faults(error)}", hint="moekit heal --help lists every option") from error


def settle(options: HealOptions, out: Path | None, overwrite: bool) -> tuple[HealOptions, Path, bool]:
    """Name the teacher, if records do."""
    if out is None:
        raise BadConfig("nothing says where to write", hint="-o OUT, in Python out=")
    settle_adapter(options.keep_adapter, out)
    if options.teacher is None and lies_here(options.model):
        options = options.model_copy(update={"teacher": open_sources(options.model, None).reference})
    if (cache := _cache(options)) is not None:
        check_apart(out, cache)
        for _, reference in options.inputs():
            for source in local_parts(reference):
                check_apart(cache, source)
    return options, out, overwrite


def estimate(options: HealOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """The student as large as before, its checkpoints while it learns, and both models in memory."""
    model = model_item(options.model, sizes)
    reads = [model, *(model_item(item, sizes) for item in (options.teacher,) if item)]
    texts = [text_item(item, sizes) for item in (options.data, options.heldout) if item]
    factor = _MANY_TRAIN if options.what in ("experts", "all") else _FEW_TRAIN
    teachers = total(item.nbytes for item in reads[1:]) or 0
    needed = None if model.nbytes is None else factor * (model.nbytes + teachers * options.control) + teachers
    written = changed_bytes(options.model, model)
    kept = None if written is None or model.nbytes is None else written + (factor - 2) * model.nbytes
    return JobEstimate((*reads, *texts), (Item(str(out), written),), disk=kept, memory=needed)


def run(options: HealOptions, context: JobContext) -> dict[str, Any]:
    """Ask the teacher, let the student learn, measure, write."""
    check(options)
    settings = config_of(options)
    sources = open_sources(options.model, options.teacher, context.progress)
    _warn_of_grid(options, sources)
    lesson = read_lesson(options, settings, sources, context)
    check_parts(sources, options.what, options.device, context.progress)
    taught = ask_teacher(_teachers_model(sources, options, context), lesson, settings, context, _cache(options))
    model = open_student(sources.student, options.device, context.progress)
    before = _measure(model, lesson, taught, STUDENT, context)
    work = Healing(options, sources, lesson, context, _record(options, lesson, sources))
    result = learn(work, model, taught.teacher)
    as_stored(model, sources.student)
    after = _measure(model, lesson, taught, HEALED, context)
    proof = _prove(work, taught, before, after)
    told = _figures(options, sources, taught, result, proof)
    kept = {name: value for name, value in told.items() if name not in ("losses", "proof")}
    place_adapter(options.keep_adapter, context, options.model)
    work.write(model, {**kept, "losses": [result.losses[0], result.losses[-1]]})
    return {**told, "changed": changed_tensors(sources.student, Checkpoint.open(context.out))}


def _warn_of_grid(options: HealOptions, sources: Sources) -> None:
    """Say that weights which were rounded or zeroed do not stay so where they learn."""
    record = sources.student.record
    if record is None or options.what in ("router", "norms"):
        return
    for key, kind in (("bits", "rounded to few bits"), ("sparsity", "zeroed in part")):
        if record.config.get(key):
            logger.warning("%s: its experts were %s, and what learns does not stay so: %s", options.model, kind, _STAY)


def _cache(options: HealOptions) -> Path | None:
    return None if options.teacher_cache is None else Path(options.teacher_cache).expanduser()


def _teachers_model(sources: Sources, options: HealOptions, context: JobContext) -> Any:
    def opened() -> PreTrainedModel:
        model: PreTrainedModel = open_model(
            str(sources.teacher.path), device=options.device, dtype="auto", progress=context.progress
        )[0]
        return model

    return opened


def _measure(
    model: PreTrainedModel, lesson: Lesson, taught: Taught, name: str, context: JobContext
) -> Closeness | None:
    if lesson.heldout is None or taught.heldout is None:
        return None
    rows, batch = lesson.heldout.rows, lesson.config.batch
    return closeness(model, rows, taught.heldout, batch=batch, name=name, progress=context.progress)


def _prove(work: Healing, taught: Taught, before: Closeness | None, after: Closeness | None) -> HealingProof | None:
    heldout, context = work.lesson.heldout, work.context
    if heldout is None or taught.parent is None or before is None or after is None:
        return None
    control = None
    if work.options.control:
        control = _measure(train_control(work, taught.teacher), work.lesson, taught, "control", context)
    return prove(heldout.source, heldout.window, taught.parent, before, after, control=control, seed=context.seed)


def _record(options: HealOptions, lesson: Lesson, sources: Sources) -> dict[str, Any]:
    """What the record of the healed model keeps: enough to do it again, and to find the teacher next time."""
    return {
        "what": options.what,
        TEACHER: local(sources.reference),
        FINGERPRINT: sources.teacher.fingerprint,
        "data": options.data,
        **lesson.config.model_dump(mode="json", exclude_defaults=True),
    }


def _figures(
    options: HealOptions, sources: Sources, taught: Taught, result: TrainResult, proof: HealingProof | None
) -> dict[str, Any]:
    names = ("steps", "tokens", "seconds", "losses", "trained", "parameters", "precision", "resumed_from", "notes")
    told = result.model_dump(mode="json", include=set(names))
    return {
        "teacher": sources.reference,
        "what": options.what,
        **told,
        "self_divergence": taught.self_divergence,
        **({} if proof is None else {"proof": proof.model_dump(mode="json")}),
    }
