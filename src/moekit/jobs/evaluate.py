"""`use: evaluate`: perplexity per domain and multiple choice, compared with a baseline pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moekit._device import DtypeName
from moekit._ranks import is_first_rank
from moekit.checkpoint import atomic_folder
from moekit.data import Document, Question, load_questions, tokenize
from moekit.data.encoding import Bos
from moekit.data.forcing import reading_notes, refuse_reader
from moekit.data.passages import units
from moekit.errors import BadConfig
from moekit.evaluation import Evaluation, TaskResult, choices, compare, perplexity_of_documents
from moekit.evaluation.questions import check_choices
from moekit.jobs.call import JobResult, ModelLike, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.evaluate import EvaluateOptions
from moekit.jobs.shared.inputs import model_item, open_model, read_text, text_item
from moekit.jobs.shared.ranked import check_ranks, deal_out, ranks_of
from moekit.parallel.launch.start import StartedRanks
from moekit.progress import ProgressLike
from moekit.report.results import COMPARISON, EVALUATION, load_evaluation


class EvaluateResult(JobResult):
    """Perplexities and answers, with error bars.

    Attributes:
        name: of the model, in tables.
        domains: all text, then each domain: perplexity with its interval.
        tasks: multiple choice: each metric with its standard error.
        comparison: paired with the baseline; None without.
        warnings: what a reader must know of how the text was read.
    """

    name: str
    domains: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    comparison: dict[str, Any] | None = None
    warnings: list[str] = Field(default_factory=list)


def evaluate(
    model: ModelLike,
    *,
    plan: str | Path | None = None,
    name: str = "",
    data: TextLike | None = None,
    split: Literal["train", "heldout"] | None = None,
    max_tokens: int | None = None,
    window: int | None = None,
    questions: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    baseline: str | Path | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    ep: int = 1,
    nodes: int = 1,
    dispatch: str = "once-per-rank",
    placement: str | Path | None = None,
    codec: Literal["none", "int8"] = "none",
    tokenizer: Any = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> EvaluateResult:
    """Measure a model on held-out text and on questions, and compare it with a baseline measured on the same.

    Args:
        model: model: folder or hub id.
        plan: routing plan to route by; the checkpoint's own by default.
        name: what to call the model in tables; by default the folder's name.
        data: text for perplexity: file, folder, source, mix or hub id.
        split: part of the text to take.
        max_tokens: tokens, at most, shared among the documents.
        window: longest context in tokens (default: the model's, ≤ 1024)
        questions: files, folders or sources of multiple choice.
        tasks: tasks of lm-eval's registry, fetched from the hub.
        limit: questions of each task, at most.
        baseline: evaluation to compare with.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: cpu, cuda, ..., or auto: a GPU if there is one.
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        ep: ranks that share each layer's experts; start them with torchrun.
        nodes: nodes that these ranks stand in, for hierarchical dispatch.
        dispatch: how tokens travel; see moekit methods dispatch.
        placement: placement file: which rank holds which expert.
        codec: int8 sends hidden states in 8 bits; lossy.
        tokenizer: of a model that is given live.
        out: folder of the results; None keeps nothing but the result.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit evaluate` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(EvaluateOptions, EvaluateResult, dict(locals()))


def check(options: EvaluateOptions) -> None:
    """Refuse impossible ranks, and a call that would measure nothing."""
    check_ranks(options)
    if options.data is None and not options.questions and not options.tasks:
        raise BadConfig("there is nothing to measure", hint="give --data, --questions or --tasks")


def estimate(options: EvaluateOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Results are small; the model is in memory once."""
    model = model_item(options.model, sizes)
    reads = [model, *(text_item(item, sizes) for item in (options.data, *options.questions) if item)]
    return JobEstimate(tuple(reads), (Item(str(out), 1 << 20),), disk=1 << 20, memory=model.nbytes)


def run(options: EvaluateOptions, context: JobContext) -> dict[str, Any]:
    """Read all that is compared and asked, then measure, compare and write."""
    check(options)
    given = _read(options, context)
    with ranks_of(options) as started:
        return _measure(options, given, context, started)


@dataclass(frozen=True)
class _Given:
    """What the model is measured on and compared with; read before hours of work, as any of it may be missing."""

    documents: list[Document]
    questions: list[Question]
    baseline: Evaluation | None


def _read(options: EvaluateOptions, context: JobContext) -> _Given:
    documents: list[Document] = []
    if options.data is not None:
        read = read_text(options.data, split=options.split, seed=context.seed, progress=context.progress)
        documents = units(read)
    questions: list[Question] = []
    for reference in options.questions:
        questions += load_questions(reference, limit=options.limit, seed=context.seed, progress=context.progress)
    if options.questions or options.tasks:
        check_choices(questions, options.tasks)
    return _Given(documents, questions, None if options.baseline is None else load_evaluation(options.baseline))


def _measure(
    options: EvaluateOptions, given: _Given, context: JobContext, started: StartedRanks | None
) -> dict[str, Any]:
    name = options.name or Path(options.model).name
    model, tokenizer = open_model(
        options.model,
        plan=options.plan,
        device=options.device,
        dtype=options.dtype,
        progress=context.progress,
        live=context.live,
    )
    if started is not None:
        # All ranks measure the same and deal the tokens of each batch out between them; the first one writes.
        asked = options.model_dump(mode="json", exclude={"placement", "device"})
        deal_out(model, options, started, shared_batch=True, facts={**asked, "seed": context.seed})
    if options.questions or options.tasks:
        refuse_reader(model.config, "questions cannot be asked")
    perplexity = _perplexity(options, given.documents, model, tokenizer, name, context) if given.documents else None
    tasks: tuple[TaskResult, ...] = ()
    if options.questions or options.tasks:
        tasks = choices(
            model,
            tokenizer,
            given.questions,
            tasks=options.tasks,
            limit=options.limit,
            name=name,
            progress=context.progress,
        )
    notes = reading_notes(model.config) if given.documents else ()
    evaluation = Evaluation(name=name, perplexity=perplexity, tasks=tasks)
    comparison = None if given.baseline is None else compare(given.baseline, evaluation, seed=context.seed)
    if not is_first_rank():
        return _figures(evaluation, comparison, notes)
    with atomic_folder(context.out, overwrite=context.overwrite) as folder:
        (folder / EVALUATION).write_text(evaluation.model_dump_json(indent=1) + "\n")
        if comparison is not None:
            (folder / COMPARISON).write_text(comparison.model_dump_json(indent=1) + "\n")
    return _figures(evaluation, comparison, notes)


def _perplexity(
    options: EvaluateOptions, documents: list[Document], model: Any, tokenizer: Any, name: str, context: JobContext
) -> Any:
    each = None if options.max_tokens is None else max(2, options.max_tokens // len(documents))
    tokenized = tokenize(documents, tokenizer, each, bos=options.bos)
    return perplexity_of_documents(model, tokenized, window=options.window, name=name, progress=context.progress)


def _figures(evaluation: Any, comparison: Any, notes: Sequence[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": evaluation.name, "domains": [], "tasks": [], "warnings": list(notes)}
    if evaluation.perplexity is not None:
        whole = (evaluation.perplexity.overall, *evaluation.perplexity.per_domain())
        figures["domains"] = [domain.model_dump() for domain in whole]
    for task in evaluation.tasks:
        values = {name: [metric.value, metric.standard_error] for name, metric in task.metrics.items()}
        figures["tasks"].append({"task": task.task, "n": task.n, "metrics": values})
    if comparison is not None:
        figures["comparison"] = comparison.model_dump(mode="json")
    return figures
