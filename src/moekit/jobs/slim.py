"""`use: slim`: make every expert narrower, prove what that costs, and write the smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from moekit._device import DtypeName, named_dtype, resolve_device
from moekit._memory import require_memory
from moekit.data.encoding import Bos
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, JobEstimate
from moekit.jobs.options.slim import SlimOptions
from moekit.jobs.shared.inputs import model_item
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.weights.inplace_decide import decide
from moekit.jobs.weights.inplace_finish import Placed, finish, log_warnings
from moekit.jobs.weights.inplace_job import estimate_of
from moekit.jobs.weights.inplace_request import check_decided, check_texts, inputs_of_plan, reads_whole
from moekit.jobs.weights.plans import plan_beside, save_plan
from moekit.jobs.weights.sizes import check_disk
from moekit.jobs.weights.slim_request import asked_of, check_width, method_of, summarizer, teacher_loss
from moekit.progress import ProgressLike


class SlimResult(JobResult):
    """Which experts became how narrow, and what that costs.

    Attributes:
        method: what chose the neurons that stay.
        settings: its knobs.
        width: neurons of an expert before and after.
        shared: whether there are shared experts, which stay as wide as they are.
        beside: what else was cut, shared experts' neurons or groups of attention heads: before and after.
        model: what was narrowed.
        plan: hash of the plan.
        tokens: that were decided on.
        weights: of the routed experts, before and after.
        bytes: of the folder's tensors, before and after.
        layers: each with its width, experts that no token chose, and how far the experts' outputs on the text are from
            what they were, unrepaired and repaired.
        warnings: what a reader must know of the data.
        proof: held-out text and blocks' errors, against other choices of neurons; None where nothing was proved.
        check: what the check of the written folder found; None where only a plan was written.
    """

    method: str
    settings: dict[str, Any]
    width: dict[str, int]
    shared: bool
    beside: dict[str, dict[str, int]]
    model: str
    plan: str
    tokens: int
    weights: dict[str, int]
    bytes: dict[str, int]
    layers: list[dict[str, Any]]
    warnings: list[str]
    proof: dict[str, Any] | None = None
    check: dict[str, Any] | None = None


def slim(
    model: str | Path | None = None,
    *,
    method: str | None = "slimmoe",
    settings: Mapping[str, Any] | None = None,
    width: int | float | str | None = None,
    max_bytes: str | None = None,
    teacher: str | Path | None = None,
    data: TextLike | None = None,
    heldout: TextLike | None = None,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    plan: str | Path | None = None,
    from_plan: str | Path | None = None,
    write: Literal["model", "plan"] = "model",
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> SlimResult:
    """Make every routed expert narrower (`moekit methods slim`): the same class with smaller sizes, no expert dropped.

    Shared experts and attention stay as they are unless settings name them ({"shared": "1/2", "groups": 4});
    multi-token-prediction layers are left out.

    Args:
        model: MoE: folder or hub id; a stored plan names its own.
        method: which neurons stay; see moekit methods slim.
        settings: the method's own knobs; `repair`, `multiple`.
        width: neurons that each expert keeps (384), or a share of them ("1/2", 0.5; 1.0 is all).
        max_bytes: instead of width: the widest experts with which the whole model is no larger ("12GiB").
        teacher: model that all stages are narrowed from, for settings={"score": "kd"}: neurons count by how far the
            model is from it.
        data: text to decide on: file, folder, source, mix or hub id.
        heldout: text to prove the result on; by default a tenth of data, which is kept apart for it.
        max_tokens: tokens of data, at most, shared by its domains.
        seq_len: tokens a row; the model's limit if that is less.
        batch_size: rows a pass.
        plan: also write what was decided to this file.
        from_plan: carry this plan out again instead: the same neurons; where they are repaired, on the same text.
        write: write the narrow model, or the plan alone.
        proof: measure what it costs, against neurons chosen by weights and at random.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the smaller model; None writes the plan alone.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit slim` prints.

    Raises:
        BadConfig: an impossible option or width, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
        UnsupportedModel: the weights are quantized, or the family's config cannot say such a width.
        OutOfBudget: the disk, or the memory for model or moments, is too small; said before the work.
    """
    return call(SlimOptions, SlimResult, dict(locals()))


def further_inputs(options: SlimOptions) -> list[tuple[str, str]]:
    """The model that a stored plan names."""
    return inputs_of_plan(options)


def settle(options: SlimOptions, out: Path | None, overwrite: bool) -> tuple[SlimOptions, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: SlimOptions) -> None:
    """Refuse an unknown method, impossible knobs and widths, and a run without what it needs."""
    resolve_device(options.device)
    if check_decided(options):
        if options.teacher is not None:
            raise BadConfig("a stored plan is to be carried out, but teacher is given as well", hint="leave that out")
        return
    method = method_of(options)
    check_width(options)
    if options.data is None and method.made_on_text and not method.scored_by:
        raise BadConfig("the repair is measured on text", hint="give text (--data), or say --set repair=none")
    if method.asks_teacher != (options.teacher is not None):
        what = "score=kd needs a teacher" if method.asks_teacher else "a teacher is given, but nothing is asked of it"
        raise BadConfig(what, hint="--set score=kd --teacher FOLDER, the model that all stages are narrowed from")
    if method.kept_parts and not reads_whole(method):
        raise BadConfig("shared experts and groups go by gradients", hint="--set score=taylor")
    check_texts(options)


def estimate(options: SlimOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """The size of the narrow model."""
    notes = ("routed experts become narrower; what settings do not name stays as it is",)
    known = estimate_of(options, out, sizes, lambda: asked_of(options, 0), notes)
    return (
        known if options.teacher is None else replace(known, reads=(*known.reads, model_item(options.teacher, sizes)))
    )


def run(options: SlimOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, calibrate, decide, prove, write, check."""
    check(options)
    progress, scratch, out = context.progress, context.scratch, context.out
    asked = asked_of(options, context.seed, progress)
    writes_plan = options.write == "plan"
    check_disk(out, scratch, asked.plan_bytes if writes_plan else asked.written, asked.between)
    if asked.request is not None and asked.request.method.required:
        whole = reads_whole(asked.request.method)
        what = "a backward pass through the whole model" if whole else "a layer with its second moments"
        way = "--set score=output-norm, which goes layer by layer" if whole else "--set repair=none"
        require_memory(asked.memory, what, f"use {way}")
    decided = decide(options, asked, scratch, progress, loss=None if asked.plan else teacher_loss(options, asked))
    plan = decided.plan
    log_warnings(plan.file.warnings)
    summary = summarizer(asked.source)
    if not writes_plan:
        machine = Placed(options.device, named_dtype(options.dtype))
        with plan_beside(plan, options.plan, overwrite=context.overwrite):
            return finish(decided, asked.source, machine, context, summary)
    save_plan(plan, out, overwrite=context.overwrite)
    result: dict[str, Any] = summary(plan, None)
    return result
