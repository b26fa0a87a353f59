"""`use: expert-sets`: what each task wants of every layer's experts, added to a folder of expert sets."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from moekit import catalogue
from moekit._device import DtypeName, named_dtype, resolve_device
from moekit.checkpoint import atomic_folder
from moekit.compress.engine.dropping import PruneMethod
from moekit.data import TokenizedDocument
from moekit.data.batches import arrange
from moekit.data.encoding import Bos
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.expert_sets import ExpertSetsOptions
from moekit.jobs.shared.inputs import lies_here, model_item, read_text, text_item
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.jobs.tasks.texts import Texts, account, log_warnings, tasks_of, texts_of_tasks
from moekit.jobs.weights.sizes import bytes_between, check_disk, memory_of
from moekit.progress import ProgressLike
from moekit.serving.expert_sets.expert_set import GENERALIST, ExpertSet, generalist
from moekit.serving.expert_sets.recording import GroupedText
from moekit.serving.expert_sets.scoring import check_method, from_statistics
from moekit.serving.expert_sets.store import INDEX_FILE, ExpertSetStore
from moekit.trace.statistics import LayerStatistics

logger = logging.getLogger(__name__)
_STORE_BYTES = 1 << 20
# The method whose scores are means over all tokens, so that those of several tasks add up.
_MEANS = "premoe"


class ExpertSetsResult(JobResult):
    """What was recorded of each task.

    Attributes:
        method: what scored the experts.
        settings: its knobs.
        experts: of a layer.
        layers: MoE layers.
        made: for each task of this call: tokens, documents, experts never routed, bytes.
        tasks: all that the folder holds.
    """

    method: str
    settings: dict[str, Any]
    experts: int
    layers: list[int]
    made: list[dict[str, Any]]
    tasks: list[str]


def expert_sets(
    model: str | Path,
    *,
    data: TextLike,
    task: str | None = None,
    method: str = "premoe",
    settings: Mapping[str, Any] | None = None,
    generalist: bool = False,
    further: bool = True,
    existing: Literal["anew", "add", "replace"] | None = None,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> ExpertSetsResult:
    """Record what the routers make of a task's text, and keep the ranks of all experts: one expert set for each task.

    Args:
        model: MoE: folder or hub id.
        data: text of the task, or of several, each a domain of it.
        task: name of the task; without it each domain of data is a task.
        method: what scores the experts; see moekit methods prune.
        settings: the method's own knobs.
        generalist: also store an expert set of all tasks of the folder together.
        further: keep the scores of all layers: without them prompts are compared at the first alone, and tasks cannot
            be pooled later.
        existing: expert sets that the folder holds: make it anew, add to them, or replace tasks of the same name too;
            by default they are added to, with overwrite replaced.
        max_tokens: tokens of each task, at most, shared among its documents.
        seq_len: tokens a row; the model's limit if that is less.
        batch_size: rows a pass.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of expert sets; tasks are added to it.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit expert-sets` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(ExpertSetsOptions, ExpertSetsResult, dict(locals()))


def settle(options: ExpertSetsOptions, out: Path | None, overwrite: bool) -> tuple[ExpertSetsOptions, Path, bool]:
    """Tasks are added to a folder that is there; `overwrite` replaces those of the same name.

    Raises:
        BadConfig: nothing says where to write, or something else is there.
    """
    if out is None:
        raise BadConfig("nothing says where to write", hint="-o OUT, a folder of expert sets")
    if out.exists() and not (out / INDEX_FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise BadConfig("there is something else here, and no expert sets", file=out, hint="choose another folder")
    if options.existing == "anew":
        return options, out, overwrite
    if options.existing == "add" and overwrite:
        raise BadConfig("tasks are to be added, and overwrite is said", hint="leave one of them out")
    # The folder stays: tasks are added to it.
    return options.model_copy(update={"existing": options.existing or ("replace" if overwrite else "add")}), out, True


def check(options: ExpertSetsOptions) -> None:
    """Refuse an unknown method, one that gives no ranks, and a task of the generalist's name."""
    resolve_device(options.device)
    check_method(catalogue.make("prune", options.method, options.settings))
    if options.task == GENERALIST:
        raise BadConfig(f"{GENERALIST!r} is the name of all tasks together", hint="choose another one, or --generalist")
    if options.generalist and not options.further:
        raise BadConfig("tasks cannot be pooled without the scores of all layers", hint="leave --no-further out")


def estimate(options: ExpertSetsOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """A few hundred kilobytes are written; what lies on the disk meanwhile are the text's hidden states."""
    reads = (model_item(options.model, sizes), text_item(options.data, sizes))
    notes: tuple[str, ...] = ("layers are read from disk one at a time: memory does not grow with their number",)
    if not lies_here(options.model):
        return JobEstimate(reads, (Item(str(out), _STORE_BYTES),), notes=notes)
    source = open_source(options.model)
    tasks, memory = tasks_of(options.data, options.task, sizes), memory_of(source, options)
    if tasks is None:
        notes = (*notes, "each domain of the text is a task; how many it has is known when it is read")
        return JobEstimate(reads, (Item(str(out), _STORE_BYTES),), memory=memory, notes=notes)
    disk = _STORE_BYTES + _between(options, source, tasks)
    return JobEstimate(reads, (Item(str(out), _STORE_BYTES),), disk=disk, memory=memory, notes=notes)


def run(options: ExpertSetsOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, record, rank, store."""
    check(options)
    source = open_source(options.model, context.progress)
    method = catalogue.make("prune", options.method, options.settings)
    texts = _texts(options, source, context)
    _refuse_known(options, context.out, source, method, texts)
    check_disk(context.out, context.scratch, _STORE_BYTES, _between(options, source, len(texts)))
    found = _record(options, source, method, texts, context)
    made = [_expert_set(options, name, found[name], texts[name], method, source) for name in texts]
    if options.generalist:
        store = _store_before(options, context.out, source)
        known = {} if store is None else store.load_all()
        rest = [p for name, p in known.items() if name != GENERALIST and name not in texts]
        made.append(_pooled(options, source, method, found, texts, [*rest, *made]))
    _store(options, made, source, context)
    return _told(options, made, source, context)


def _between(options: ExpertSetsOptions, source: OpenedModel, tasks: int) -> int:
    return bytes_between(source, options, tokens=tasks * (options.max_tokens or (1 << 20)))


def _anew(options: ExpertSetsOptions) -> bool:
    """Whether the folder is made anew: where nothing is said, as a recipe's step writes a folder of its own."""
    return options.existing in (None, "anew")


def _texts(options: ExpertSetsOptions, source: OpenedModel, context: JobContext) -> Texts:
    """Task -> its documents; read before any work, as one may turn out empty."""
    documents = read_text(options.data, seed=context.seed, progress=context.progress)
    return texts_of_tasks(documents, options.data, options.task, source.tokenizer(), options.max_tokens, options.bos)


def _store_before(options: ExpertSetsOptions, out: Path, source: OpenedModel) -> ExpertSetStore | None:
    """The folder that tasks are added to; None where there is none yet, or it is made anew."""
    if _anew(options) or not (out / INDEX_FILE).is_file():
        return None
    return ExpertSetStore(out, source.checkpoint.fingerprint)


def _refuse_known(
    options: ExpertSetsOptions, out: Path, source: OpenedModel, method: PruneMethod, tasks: Collection[str]
) -> None:
    """Refuse before any work what could not be stored after it."""
    store = _store_before(options, out, source)
    if store is None:
        return
    index = store.index()
    if (index.origin.method, index.origin.knobs) != (options.method, method.model_dump(mode="json")):
        raise BadConfig(
            f"the expert sets here were made by {index.origin.method} with {index.origin.knobs}",
            file=out,
            hint="use the same method and knobs, or another folder",
        )
    twice = [name for name in tasks if name in index.tasks]
    if twice and options.existing == "add":
        raise BadConfig(
            f"there are expert sets of {', '.join(map(repr, twice))} already",
            file=out,
            hint="say --overwrite to replace them, or choose another name (--task)",
        )
    rest = [name for name in index.tasks if name not in tasks and name != GENERALIST]
    if options.generalist and rest and options.method != _MEANS:
        raise BadConfig(
            f"scores of {options.method} are no means over tokens, so those of tasks stored before "
            f"({', '.join(rest)}) cannot be pooled",
            file=out,
            hint="give all tasks in one call, each a domain of the data, or leave --generalist out",
        )


def _record(
    options: ExpertSetsOptions, source: OpenedModel, method: PruneMethod, texts: Texts, context: JobContext
) -> dict[str, dict[int, LayerStatistics]]:
    """One pass: every layer is read once, and all tasks go through it."""
    length = min(options.seq_len, source.longest)
    batches: dict[str, list[Any]] = {
        name: list(arrange(text, length).batches(options.batch_size)) for name, text in texts.items()
    }
    if options.task is None:
        # A task of one domain is scored as a prompt is: methods that weigh domains see a single one.
        batches = {
            name: [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in some]
            for name, some in batches.items()
        }
    reading = GroupedText(
        source.checkpoint,
        batches,
        statistics=(*method.required, "load"),
        folder=context.scratch / "calibration",
        dtype=named_dtype(options.dtype),
        device=options.device,
    )
    return reading.run(context.progress)


def _expert_set(
    options: ExpertSetsOptions,
    name: str,
    statistics: dict[int, LayerStatistics],
    text: list[TokenizedDocument],
    method: PruneMethod,
    source: OpenedModel,
) -> ExpertSet:
    return from_statistics(
        name,
        statistics,
        source.geometries,
        method,
        data=account(options.data, text),
        fingerprint=source.checkpoint.fingerprint,
        further=options.further,
    )


def _pooled(
    options: ExpertSetsOptions,
    source: OpenedModel,
    method: PruneMethod,
    found: dict[str, dict[int, LayerStatistics]],
    texts: Texts,
    others: list[ExpertSet],
) -> ExpertSet:
    """The expert set of all tasks: PreMoe's means over tokens add up, of other methods the statistics do."""
    if options.method == _MEANS:
        return generalist(others)
    merged: dict[int, LayerStatistics] = {}
    for statistics in found.values():
        merged = {n: s if n not in merged else merged[n].merge(s) for n, s in statistics.items()}
    text = [document for some in texts.values() for document in some]
    return _expert_set(options, GENERALIST, merged, text, method, source)


def _store(options: ExpertSetsOptions, expert_sets: list[ExpertSet], source: OpenedModel, context: JobContext) -> None:
    fingerprint = source.checkpoint.fingerprint
    if _anew(options):
        with atomic_folder(context.out, overwrite=context.overwrite) as folder:
            ExpertSetStore(folder, fingerprint).save_all(expert_sets)
        return
    names = [expert_set.task for expert_set in expert_sets] if options.existing == "replace" else [GENERALIST]
    ExpertSetStore(context.out, fingerprint).save_all(expert_sets, overwrite=names)


def _told(
    options: ExpertSetsOptions, expert_sets: list[ExpertSet], source: OpenedModel, context: JobContext
) -> dict[str, Any]:
    index = ExpertSetStore(context.out, source.checkpoint.fingerprint).index()
    if GENERALIST in index.tasks and not options.generalist:
        logger.warning("the generalist is still that of the tasks before: --generalist makes it anew")
    for expert_set in expert_sets:
        log_warnings(expert_set)
    made = [
        {
            "task": expert_set.task,
            "tokens": expert_set.tokens,
            "documents": sum(entry.documents for entry in expert_set.data),
            "never_routed": {str(n): experts for n, experts in expert_set.never_routed.items() if experts},
            "bytes": (context.out / index.tasks[expert_set.task].file).stat().st_size,
        }
        for expert_set in expert_sets
    ]
    origin = index.origin
    told = {"method": options.method, "settings": origin.knobs, "experts": origin.experts}
    return {**told, "layers": list(origin.layers), "made": made, "tasks": list(index.tasks)}
