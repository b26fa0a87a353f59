"""`use: generate`: the same prompts through two checkpoints, side by side, or through a task's experts alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moekit._device import DtypeName
from moekit._files import read_text
from moekit._ranks import is_first_rank
from moekit.checkpoint import atomic_folder
from moekit.errors import BadConfig, BadData
from moekit.evaluation import agreement, complete, side_by_side
from moekit.evaluation.generation import Completions
from moekit.jobs.call import JobResult, ModelLike, call
from moekit.jobs.context import JobContext, LiveModel
from moekit.jobs.estimates import ByteSizes, JobEstimate, largest
from moekit.jobs.options.generate import GenerateOptions
from moekit.jobs.shared.inputs import lies_here, model_item, open_model
from moekit.jobs.shared.ranked import check_ranks, deal_out, ranks_of
from moekit.jobs.tasks.answering import TaskModels, check_tasks, summary
from moekit.progress import ProgressLike
from moekit.serving.expert_sets.store import INDEX_FILE

COMPLETIONS = "completions.json"
PROMPTS = (
    "The most important thing about a good bridge is",
    "def fibonacci(n):\n",
    "Es war einmal ein alter König, der",
)


class GenerateResult(JobResult):
    """How prompts are continued: by one model, by two, or by the experts of each prompt's task.

    Attributes:
        model: what continued them, where there is one.
        completions: one a prompt, in order: prompt, its tokens, those of the continuation, text; with expert sets its
            task as well, and the nearest ones.
        a: name of the first of two models.
        b: name of the second.
        pairs: one a prompt: both texts, and where they part.
        identical: share of prompts continued exactly alike.
        common_share: share of tokens that come before the first difference.
        agreement: share of a's tokens that b would have chosen too, given a's text.
        model_bytes: of the whole model, with expert sets.
        expert_sets: their folder.
        loaded: task -> experts that were loaded, how many a layer has, and their bytes.
    """

    model: str | None = None
    completions: list[dict[str, Any]] = Field(default_factory=list)
    a: str | None = None
    b: str | None = None
    pairs: list[dict[str, Any]] = Field(default_factory=list)
    identical: float | None = None
    common_share: float | None = None
    agreement: float | None = None
    model_bytes: int | None = None
    expert_sets: str | None = None
    loaded: dict[str, Any] = Field(default_factory=dict)


def generate(
    model: ModelLike,
    *,
    other: str | Path | None = None,
    prompt: str | Sequence[str] = (),
    prompts: str | Path | None = None,
    max_new_tokens: int = 48,
    device: str = "auto",
    dtype: DtypeName = "auto",
    expert_sets: str | Path | None = None,
    keep: int | float | str | None = None,
    task: str | None = None,
    retrieval_layers: int = 1,
    metric: Literal["l2", "cosine"] | None = None,
    max_distance: float | None = None,
    protect: str | Path | None = None,
    top_k: int | None = None,
    other_weights: bool = False,
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
) -> GenerateResult:
    """Continue prompts with a model, and put beside it what another one says; greedily, so it can be repeated.

    Args:
        model: checkpoint: folder, hub id or packaged model; or a model in memory.
        other: checkpoint to put beside it.
        prompt: texts to continue; with no prompt at all, three of ours.
        prompts: file with one prompt a line.
        max_new_tokens: longest continuation, in tokens.
        device: cpu, cuda, ..., or auto: a GPU if there is one.
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        expert_sets: folder of expert sets (moekit expert-sets): load only the experts of each prompt's task.
        keep: what is loaded: experts a layer (64), their fraction (0.5), or bytes (12GiB)
        task: the task of all prompts; without it each prompt's is retrieved.
        retrieval_layers: MoE layers, from the first, by which it is retrieved.
        metric: distance of a prompt from a task; by default l2 for premoe, cosine for other methods.
        max_distance: a prompt farther than this from all tasks gets the generalist's experts.
        protect: experts that are always loaded: pairs such as 1:68,2:92, or a JSON file.
        top_k: choices a token makes; as before by default.
        other_weights: accept expert sets of a model of the same shape and other weights.
        ep: ranks that share each layer's experts; start them with torchrun.
        nodes: nodes that these ranks stand in, for hierarchical dispatch.
        dispatch: how tokens travel; see moekit methods dispatch.
        placement: placement file: which rank holds which expert.
        codec: int8 sends hidden states in 8 bits; lossy.
        tokenizer: of a model that is given live.
        out: folder of what was generated; None keeps nothing but the result.
        overwrite: replace what is there, at the very end.
        seed: as every job takes one; nothing is random here.
        progress: see `moekit.progress`.

    Returns:
        What `moekit generate` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: an empty prompt, no such task, or expert sets of another model.
        BadCheckpoint: a model is damaged.
    """
    return call(GenerateOptions, GenerateResult, dict(locals()))


def check(options: GenerateOptions) -> None:
    """Refuse impossible ranks, and a task's experts without a budget or for more than one model.

    Raises:
        BadConfig: naming the option.
    """
    check_tasks(options)
    if options.expert_sets is not None and (options.other is not None or options.ep > 1):
        raise BadConfig(
            "a task's experts are loaded for one model, by one process",
            hint="leave the second checkpoint and --ep out",
        )
    check_ranks(options)
    if options.ep > 1 and options.other is not None:
        raise BadConfig("ranks share one model at a time", hint="leave the second checkpoint out, or --ep")


def estimate(options: GenerateOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """One model is in memory at a time; with expert sets, one task's experts."""
    if options.expert_sets is not None:
        # An earlier step may be yet to write either.
        if not lies_here(options.model) or not (Path(options.expert_sets).expanduser() / INDEX_FILE).is_file():
            return JobEstimate((model_item(options.model, sizes), sizes.item(options.expert_sets)), (), disk=0)
        return TaskModels(options, options.model, device=options.device, dtype=options.dtype).estimate()
    items = tuple(model_item(name, sizes) for name in (options.model, options.other) if name is not None)
    return JobEstimate(items, (), disk=0, memory=largest(item.nbytes for item in items))


def run(options: GenerateOptions, context: JobContext) -> dict[str, Any]:
    """Continue the prompts, and write what came of it."""
    check(options)
    texts = [*options.prompt, *_lines(options.prompts)] or list(PROMPTS)
    if options.expert_sets is not None:
        figures = _by_task(options, texts, context)
    else:
        figures = _side_by_side(options, texts, context)
    if is_first_rank():
        with atomic_folder(context.out, overwrite=context.overwrite) as folder:
            (folder / COMPLETIONS).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return figures


def _by_task(options: GenerateOptions, texts: Sequence[str], context: JobContext) -> dict[str, Any]:
    if context.live is not None:
        raise BadConfig("a task's experts are loaded from disk, not from a model in memory", hint="give its folder")
    models = TaskModels(options, options.model, device=options.device, dtype=options.dtype, progress=context.progress)
    return dict(summary(models, models.complete(models.assign(texts), options.max_new_tokens)))


def _side_by_side(options: GenerateOptions, texts: Sequence[str], context: JobContext) -> dict[str, Any]:
    with ranks_of(options) as started:
        share = None if started is None else partial(_share, options, started)
        # The first model is given up before the second one is opened.
        first = _complete(options, options.model, texts, context, context.live, share)[0]
    if options.other is None:
        return first.model_dump(mode="json")
    second, other = _complete(options, options.other, texts, context)
    return side_by_side(first, second, agreement(other, first)).model_dump(mode="json")


def _share(options: GenerateOptions, started: Any, model: Any, **facts: Any) -> None:
    """Deal the experts out to ranks that all generate the same."""
    deal_out(model, options, started, shared_batch=True, facts=facts)


def _complete(
    options: GenerateOptions,
    reference: str,
    texts: Sequence[str],
    context: JobContext,
    live: LiveModel | None = None,
    share: Callable[..., None] | None = None,
) -> tuple[Completions, Any]:
    """How a model continues the prompts, and the model."""
    tokens, dtype = options.max_new_tokens, options.dtype
    model, tokenizer = open_model(reference, device=options.device, dtype=dtype, progress=context.progress, live=live)
    if share is not None:
        share(model, prompts=list(texts), tokens=tokens, dtype=dtype)
    made = complete(model, tokenizer, texts, max_new_tokens=tokens, name=reference, progress=context.progress)
    return made, model


def _lines(reference: str | None) -> list[str]:
    if reference is None:
        return []
    file = Path(reference).expanduser()
    try:
        lines = [line for line in read_text(file).splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadData(f"is not UTF-8 text (byte {error.start})", file=file, hint="convert it, as with iconv") from error
    if not lines:
        raise BadData("the file holds no prompt", file=file, hint="write one a line")
    return lines
