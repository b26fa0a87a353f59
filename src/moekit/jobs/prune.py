"""`use: prune`: decide which experts go, prove what that costs, and write the model without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit import catalogue
from moekit._device import DtypeName, named_dtype, resolve_device
from moekit.checkpoint import atomic_folder
from moekit.compress.engine.describing import mtp_warnings, warnings_of
from moekit.compress.engine.measuring import refuse_damaged, sizes_of
from moekit.compress.engine.mtp_routing import mtp_scores
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.searching import plan_by_search
from moekit.data import Document, TokenBatches
from moekit.data.encoding import Bos
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.options.prune import PruneOptions
from moekit.jobs.shared.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.inputs import calibration_rows, model_item, record_bytes, text_item
from moekit.jobs.shared.mtp import check_mtp, cuts_mtp
from moekit.jobs.shared.opened import OpenedModel, check_runnable, open_source
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.shared.protection import SUPER, parse_protected, protection_needs, super_experts
from moekit.jobs.shared.pruned import Decided, finish, in_groups, log_warnings, summary_of_plan
from moekit.jobs.shared.pruning import (
    PLAN_FILE,
    ResultSize,
    budget_of,
    bytes_between,
    check_disk,
    refuse_uneven,
    size_of_result,
    warn_uneven,
)
from moekit.jobs.shared.self_calibration import answered_rows, load_for_answers
from moekit.jobs.shared.texts import kept_apart, read_texts
from moekit.progress import ProgressLike
from moekit.streaming.states import States
from moekit.trace import Trace
from moekit.trace.streamed import Streamed


class PruneResult(JobResult):
    """What pruning decided, and what that costs.

    Attributes:
        method: what decided.
        settings: its knobs.
        budget: what was to stay.
        top_k: choices a token makes; None as before.
        groups: what became of routing groups.
        model: what was pruned.
        plan: hash of the plan.
        tokens: that were decided on.
        domains: of the text.
        experts: before and after, over all layers.
        bytes: before and after.
        layers: each with experts, those kept, never routed and protected, and the method's figures.
        warnings: what a reader must know of the data.
        proof: held-out text and blocks' errors, against baselines; None where nothing was proved.
        check: what the check of the written folder found; None where only a plan was written.
    """

    method: str
    settings: dict[str, Any]
    budget: dict[str, Any]
    top_k: int | None
    groups: str
    model: str
    plan: str
    tokens: int
    domains: list[str]
    experts: dict[str, int]
    bytes: dict[str, int]
    layers: list[dict[str, Any]]
    warnings: list[str]
    proof: dict[str, Any] | None = None
    check: dict[str, Any] | None = None


def prune(
    model: str | Path,
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    keep: int | float | str,
    data: TextLike | None = None,
    trace: str | Path | None = None,
    heldout: TextLike | None = None,
    scope: Literal["uniform", "global"] = "uniform",
    least: int | None = None,
    most: int | None = None,
    top_k: int | None = None,
    groups: Literal["free", "equal"] = "free",
    protect: str | Path | None = None,
    self_generated: int | None = None,
    demonstrations: int = 25,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    plan: str | None = None,
    write: Literal["model", "plan"] = "model",
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    random_seeds: int = 1,
    stock_only: bool = False,
    mtp: Literal["drop", "keep", "prune"] = "drop",
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> PruneResult:
    """Let a pruning method (`moekit methods prune`) decide, prove what that costs, and write the smaller model.

    Args:
        model: MoE: folder or hub id.
        method: which experts go; see moekit methods prune.
        settings: the method's own knobs.
        keep: what stays: experts a layer (64), their fraction (0.5; 1.0 is all), or bytes of the model (12GiB)
        data: text to decide on: file, folder, source, mix or hub id.
        trace: trace of this model to decide on, instead of data.
        heldout: text to prove the result on; by default a tenth of data, which is kept apart for it.
        scope: equally many in each layer, or wherever they are worth most (moekit.load only)
        least: fewest a layer keeps, with scope global.
        most: most a layer keeps, with scope global.
        top_k: choices a token makes from now on; as before by default.
        groups: routing groups: lift the router's limits to them, or keep equally many of each.
        protect: experts that stay: super, layer:expert pairs such as 1:68,2:92, or a JSON file.
        self_generated: take data as prompts: decide on each with the model's own answer of up to so many tokens behind
            it (the whole model runs, not layer by layer)
        demonstrations: prompts of each domain that are answered.
        max_tokens: tokens of data, at most, shared by its domains; answered prompts count apart.
        seq_len: tokens a row, the model's limit if that is less; a prompt and its answer are one.
        batch_size: rows a pass.
        plan: also write scores and outcome to this file.
        write: write the smaller model, or the plan alone.
        proof: measure what it costs, against frequency and random pruning.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        random_seeds: random choices that the proof compares with.
        stock_only: refuse what stock transformers does not load.
        mtp: multi-token-prediction layers: leave them out, copy them, or cut them to as many experts, those that their
            own router gives the most weight on the text, behind the decoder as it was.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the smaller model; None writes the plan alone.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit prune` prints.

    Raises:
        BadConfig: an impossible option, a budget that the model cannot have, or nothing to decide or prove on.
        BadData: no text.
        BadCheckpoint: the model is damaged, or what was written is not what it must be; then nothing is left.
        OutOfBudget: the disk is too small.
    """
    return call(PruneOptions, PruneResult, dict(locals()))


def settle(options: PruneOptions, out: Path | None, overwrite: bool) -> tuple[PruneOptions, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: PruneOptions) -> None:
    """Refuse an unknown method, impossible knobs and budgets, and a run without what it needs."""
    budget = budget_of(options.keep, options.scope, options.least, options.most)  # first: it is known at once
    resolve_device(options.device)
    method = catalogue.make("prune", options.method, options.settings)
    refuse_uneven(budget, options.stock_only)
    if budget.scope == "global" and method.searches:
        raise BadConfig(f"{options.method} needs to know how many experts each layer keeps", hint="--scope uniform")
    if options.data is not None and options.trace is not None:
        raise BadConfig("data and trace are both given", hint="decide on one of them; --heldout is for the proof")
    if options.trace is not None and method.searches:
        raise BadConfig(f"{options.method} runs layers on text, which a trace does not hold", hint="give --data")
    if options.data is None and options.trace is None and (method.searches or method.required):
        what = "runs layers on text" if method.searches else f"decides from {', '.join(method.required)}"
        raise BadConfig(f"{options.method} {what}", hint="give text (--data) or a trace (--trace) of this model")
    if options.self_generated is not None and options.data is None:
        raise BadConfig("there are no prompts to answer", hint="give prompts (--data), or leave --self-generated out")
    if options.protect == SUPER and options.data is None and options.trace is None:
        raise BadConfig("super experts are found on text", hint="give text (--data) or a trace that holds them")
    if _proves(options) and options.data is None and options.heldout is None:
        raise BadConfig(
            "there is no text to prove the result on", hint="give --heldout TEXT, or say --no-proof to go without"
        )


def _proves(options: PruneOptions) -> bool:
    return options.proof and options.write == "model"


def _statistics(options: PruneOptions, source: OpenedModel, method: Any) -> tuple[str, ...]:
    """What is recorded: what the method, the protection and the baselines look at."""
    needed = protection_needs(source) if options.protect == SUPER else ()
    return tuple(dict.fromkeys((*method.required, *needed, "load")))


def estimate(options: PruneOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Exact where the model lies here; the bytes of a model that is not here yet are those of its parent."""
    model = model_item(options.model, sizes)
    reads = [model, *(text_item(text, sizes) for text in (options.data, options.heldout) if text)]
    reads += [sizes.item(options.trace)] if options.trace else []
    notes = [] if options.self_generated is None else ["the whole model is loaded to answer the prompts"]
    notes += ["layers are read from disk one at a time: memory does not grow with their number"]
    if options.scope == "global":
        notes.append("layers may keep different numbers of experts: the result loads through moekit.load only")
    if options.write == "plan":
        return JobEstimate(tuple(reads), (Item(str(out), 16 << 20),), disk=16 << 20, notes=tuple(notes))
    if not (Path(options.model).expanduser() / "config.json").is_file():
        return JobEstimate(tuple(reads), (Item(str(out), model.nbytes),), disk=model.nbytes, notes=tuple(notes))
    source = open_source(options.model)
    request = _request(options, source, 0)
    outlook = _foresee(options, source, request)
    nbytes = outlook.nbytes + record_bytes(source.checkpoint.tensors.values())
    disk = nbytes + _between(options, source, outlook, request)
    memory = 2 * max(_layer_bytes(source).values()) + (1 << 30)
    memory = memory if options.self_generated is None else max(memory, source.nbytes + (1 << 30))
    return JobEstimate(tuple(reads), (Item(str(out), nbytes),), disk=disk, memory=memory, notes=tuple(notes))


def run(options: PruneOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, calibrate, decide, prove, write, check."""
    check(options)
    source = open_source(options.model, context.progress)
    request = _request(options, source, context.seed)
    warn_uneven(request.keep_budget)
    outlook = _foresee(options, source, request)
    if _proves(options):
        check_runnable(source)
    if options.write == "model":
        check_disk(context.out, context.scratch, outlook.nbytes, _between(options, source, outlook, request))
    apart = options.heldout is None
    documents, heldout = read_texts(options, source, context, apart=apart, proves=_proves(options))
    rows = _rows(options, documents, source, context)
    decided = _decide(options, source, request, rows, context)
    warnings = log_warnings(decided.plan)
    if options.plan is not None:
        decided.plan.save(options.plan)
    if options.write == "model":
        return finish(decided, heldout, options, context, warnings)
    _save_plan(decided.plan, context)
    return summary_of_plan(decided, warnings, outlook.tensors)


def _request(options: PruneOptions, source: OpenedModel, seed: int) -> PlanRequest:
    method = catalogue.make("prune", options.method, options.settings)
    budget = budget_of(options.keep, options.scope, options.least, options.most)
    named = options.protect is not None and options.protect != SUPER
    protected = parse_protected(str(options.protect), source) if named else None
    return PlanRequest(method, budget, options.top_k, options.groups, seed, protected)


def _foresee(options: PruneOptions, source: OpenedModel, request: PlanRequest) -> ResultSize:
    check_mtp(source.checkpoint, options.mtp, request, options.data is not None)
    return size_of_result(source, request, options.method, stock_only=options.stock_only, mtp=options.mtp)


def _between(options: PruneOptions, source: OpenedModel, outlook: ResultSize, request: PlanRequest) -> int:
    tokens = 0 if options.data is None else options.max_tokens or (1 << 20)
    tokens *= 2 if request.method.searches else 1
    proof = (options.proof_tokens or (1 << 20)) if _proves(options) else 0
    rewritten = 0
    if request.method.rewrites:
        each = _layer_bytes(source)
        rewritten = sum(each[n] * count // source.geometries[n].experts for n, count in outlook.counts.items())
    return bytes_between(source, tokens, proof, 2 + options.random_seeds, rewritten)


def _rows(
    options: PruneOptions, documents: list[Document], source: OpenedModel, context: JobContext
) -> TokenBatches | None:
    if not documents:
        return None
    if options.self_generated is None:
        length = min(options.seq_len, source.longest)
        return calibration_rows(
            documents, source.tokenizer(), seq_len=length, max_tokens=options.max_tokens, bos=options.bos
        )
    return answered_rows(
        documents,
        source,
        context,
        new_tokens=options.self_generated,
        each=options.demonstrations,
        load=lambda: load_for_answers(source, options.device, options.dtype),
    )


def _decide(
    options: PruneOptions, source: OpenedModel, request: PlanRequest, rows: TokenBatches | None, context: JobContext
) -> Decided:
    if rows is None:
        trace = None if options.trace is None else Trace.load(options.trace)
        request = _protected(options, request, source, trace)
        return _complete(
            options, source, request, plan_weights(source.checkpoint, trace, request, context.progress), trace
        )
    with Streamed(
        source.checkpoint,
        rows.batches(options.batch_size),
        statistics=_statistics(options, source, request.method),
        folder=context.scratch / "calibration",
        dtype=named_dtype(options.dtype),
        device=options.device,
    ) as streamed:
        mtp: dict[str, tuple[float, ...]] = {}

        def look_ahead(last: States) -> None:
            if cuts_mtp(source.checkpoint, options.mtp):
                mtp.update(mtp_scores(streamed, last))

        streamed.run(context.progress, refuse_damaged, look_ahead)
        trace = streamed.trace(tokenizer=source.tokenizer(), source=_origin(options), seed=context.seed)
        request = _protected(options, request, source, trace)
        known = _known_plan(context, trace, request)
        if known is not None:
            plan = known
        elif request.method.searches:
            plan = plan_by_search(source.checkpoint, trace, streamed, request, context.progress)
        else:
            plan = plan_weights(source.checkpoint, trace, request, context.progress)
    if known is None:
        plan.save(context.scratch / PLAN_FILE)
    return _complete(options, source, request, plan, trace, mtp)


def _origin(options: PruneOptions) -> str:
    """How the plan names its text: the part in brackets tells that the rest was kept apart."""
    path = Path(str(options.data)).expanduser()
    name = str(path.resolve()) if path.exists() else str(options.data)
    return name if options.heldout is not None else f"{name}[train]"


def _protected(options: PruneOptions, request: PlanRequest, source: OpenedModel, trace: Trace | None) -> PlanRequest:
    if options.protect != SUPER or trace is None:
        return request
    return dataclasses.replace(request, protected=super_experts(source, trace))


def _complete(
    options: PruneOptions,
    source: OpenedModel,
    request: PlanRequest,
    plan: WeightPlan,
    trace: Trace | None,
    mtp: Mapping[str, tuple[float, ...]] | None = None,
) -> Decided:
    """The plan in its final form, with what baselines decide from."""
    layers = in_groups(source, plan)
    warnings = (*warnings_of(request.method, layers, plan.file.data), *mtp_warnings(mtp or {}))
    changed = {"layers": layers, "warnings": warnings, "mtp": dict(mtp or {})}
    changed |= {"text_sha256": text_hash(options.data), "kept_apart": kept_apart(plan.file.data)}
    plan = WeightPlan(plan.file.model_copy(update=changed), plan.statistics)
    try:
        counted = {} if trace is None else dict(trace.require(("load",)))
    except MoekitError:
        counted = {}  # a trace of something else: frequency cannot be compared with
    return Decided(source, request, plan, counted)


def _layer_bytes(source: OpenedModel) -> dict[int, int]:
    """Bytes of all routed experts of each layer."""
    sizes = sizes_of(source.checkpoint, source.geometries)
    return {layer: each * sizes.experts[layer] for layer, each in sizes.expert_bytes.items()}


def _known_plan(context: JobContext, trace: Trace, request: PlanRequest) -> WeightPlan | None:
    """The plan that an interrupted run of the same work had come to."""
    file = context.scratch / PLAN_FILE
    try:
        plan = WeightPlan.load(file) if file.is_file() else None
    except MoekitError:
        return None
    if plan is None or plan.file.trace != trace.digest or plan.file.protected != (request.protected or {}):
        return None
    return plan


def _save_plan(plan: WeightPlan, context: JobContext) -> None:
    """As a file of that name, or in a folder, whole or not at all."""
    if context.out.suffix == ".json":
        plan.save(context.out)
        return
    with atomic_folder(context.out, overwrite=context.overwrite) as folder:
        plan.save(folder / PLAN_FILE)
