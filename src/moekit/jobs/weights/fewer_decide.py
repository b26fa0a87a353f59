"""From text, or from a trace of it, to a pruning plan in its final form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from moekit._device import named_dtype
from moekit._progress import Progress
from moekit.compress.engine.describing import beside_warnings, mtp_warnings, warnings_of
from moekit.compress.engine.making import make_layers
from moekit.compress.engine.measuring import refuse_damaged
from moekit.compress.engine.mtp_routing import mtp_scores
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.searching import plan_by_search
from moekit.data import Document, TokenBatches
from moekit.data.forcing import reading_notes
from moekit.errors import MoekitError
from moekit.jobs.options.fewer import FewerOptions
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.inputs import calibration_rows
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.fewer_finish import Decided, baseline_needs, baselines_of, in_groups
from moekit.jobs.weights.fewer_request import Asked, proves
from moekit.jobs.weights.mtp import cuts_mtp
from moekit.jobs.weights.plans import PLAN_FILE, known_plan, origin
from moekit.jobs.weights.protection import SUPER, protection_needs, super_experts
from moekit.jobs.weights.self_calibration import answered_rows, load_for_answers
from moekit.jobs.weights.texts import kept_apart
from moekit.streaming.passes import Passes
from moekit.trace import Trace
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed


def decide(
    options: FewerOptions, asked: Asked, documents: list[Document], scratch: Path, progress: Progress | None
) -> Decided:
    """Run the text through the model layer by layer, or read the trace, and let the method decide.

    Args:
        options: of the job.
        asked: the model, and what was asked for.
        documents: text to decide on; none where a trace, or nothing, says it.
        scratch: for hidden states, answers, and the plan, so that an interrupted run goes on.
        progress: told layer by layer.

    Raises:
        BadConfig: no prompt leaves room for an answer.
        BadData: the trace does not hold what the method decides from, or is another model's.
        BadCheckpoint: weights are damaged.
    """
    if documents:
        return _from_text(options, asked, _rows(options, asked, documents, scratch, progress), scratch, progress)
    trace = None if options.trace is None else Trace.load(options.trace)
    request = _protecting(options, asked, trace)
    plan = plan_weights(asked.source.checkpoint, trace, request, progress)
    return _complete(options, asked.source, request, plan, trace, {})


def _rows(
    options: FewerOptions, asked: Asked, documents: list[Document], scratch: Path, progress: Progress | None
) -> TokenBatches:
    source = asked.source
    if options.self_generated is None:
        length = min(options.seq_len, source.longest)
        return calibration_rows(
            documents,
            source.tokenizer(),
            seq_len=length,
            max_tokens=options.max_tokens,
            bos=options.bos,
            pictures=source.pictures(documents),
        )
    return answered_rows(
        documents,
        source,
        scratch,
        new_tokens=options.self_generated,
        each=options.demonstrations,
        seed=asked.request.seed,
        load=lambda: load_for_answers(source, options.device, options.dtype),
        progress=progress,
    )


def _from_text(
    options: FewerOptions, asked: Asked, rows: TokenBatches, scratch: Path, progress: Progress | None
) -> Decided:
    source, method, mtp = asked.source, asked.request.method, dict[str, tuple[float, ...]]()
    batches, follows = list(rows.batches(options.batch_size)), method.passes == "sequential"
    # What method, protection and baselines look at; a method that follows its changes measures behind them.
    needed = (*(() if follows else method.required), *(protection_needs(source) if options.protect == SUPER else ()))

    def look_ahead(last: Passes) -> None:
        if cuts_mtp(source.checkpoint, options.mtp):
            mtp.update(mtp_scores(streamed, last))

    with Streamed(
        source.checkpoint,
        batches,
        statistics=tuple(dict.fromkeys((*needed, *baseline_needs(method, options.kind), "load"))),
        folder=scratch / "calibration",
        dtype=named_dtype(options.dtype),
        device=options.device,
    ) as streamed:
        streamed.run(progress, refuse_damaged, look_ahead)
        text = origin(options.data, apart=options.heldout is None)
        trace = streamed.trace(tokenizer=source.tokenizer(), source=text, seed=asked.request.seed)
        request = _protecting(options, asked, trace)
        plan = known_plan(scratch / PLAN_FILE, trace.digest, request.protected or {})
        if plan is None:
            if method.searches:
                plan = plan_by_search(source.checkpoint, trace, streamed, request, progress)
            elif follows:
                dtype = named_dtype(options.dtype)
                again = CalibrationText(batches, scratch / "behind", dtype, options.device, source.tokenizer(), text)
                plan = plan_weights(source.checkpoint, again, request, progress)
                plan = WeightPlan(plan.file.model_copy(update={"trace": trace.digest}), plan.statistics)
            else:
                plan = plan_weights(source.checkpoint, trace, request, progress)
            plan.save(scratch / PLAN_FILE)
    decided = _complete(options, source, request, plan, trace, mtp)
    if request.repair is not None:
        dtype = named_dtype(options.dtype)
        again = CalibrationText(batches, scratch / "repair", dtype, options.device, source.tokenizer(), text)
        _repair(decided, again, options, progress)
    return decided


def _repair(decided: Decided, text: CalibrationText, options: FewerOptions, progress: Progress | None) -> None:
    """Make the weights of the plan, and of the baselines that it is proved against, alike."""
    others = baselines_of(decided, options.random_seeds) if proves(options) else []
    # A baseline that redirects tokens stays as it is: a repair does not follow them.
    alike = [other if not other.method.redirects else other.with_file(repair=None) for _, other in others]
    decided.plan, *made = make_layers(decided.source.checkpoint, text, [decided.plan, *alike], progress)
    decided.others = [(name, plan) for (name, _), plan in zip(others, made, strict=True)]


def _protecting(options: FewerOptions, asked: Asked, trace: Trace | None) -> PlanRequest:
    """The request, with the super experts that the text shows where they are to stay."""
    if options.protect != SUPER or trace is None:
        return asked.request
    return dataclasses.replace(asked.request, protected=super_experts(asked.source, trace))


def _complete(
    options: FewerOptions,
    source: OpenedModel,
    request: PlanRequest,
    plan: WeightPlan,
    trace: Trace | None,
    mtp: Mapping[str, tuple[float, ...]],
) -> Decided:
    """The plan in its final form, with what baselines decide from."""
    layers = in_groups(source, plan)
    notes = reading_notes(source.checkpoint.config) if plan.file.data else ()
    beside = (*beside_warnings(source.checkpoint), *notes)
    warnings = (*warnings_of(request.method, layers, plan.file.data), *mtp_warnings(mtp), *beside)
    changed = {"layers": layers, "warnings": warnings, "mtp": dict(mtp)}
    changed |= {"text_sha256": text_hash(options.data), "kept_apart": kept_apart(plan.file.data)}
    plan = WeightPlan(plan.file.model_copy(update=changed), plan.statistics)
    needs = ("load", *baseline_needs(request.method, options.kind))
    return Decided(source, request, plan, {} if trace is None else _what_it_has(trace, needs))


def _what_it_has(trace: Trace, names: Iterable[str]) -> dict[int, LayerStatistics]:
    """Those of some statistics that a trace carries or can compute: of other traces it is not known what they hold."""
    had = []
    for name in dict.fromkeys(names):
        try:
            trace.require((name,))
        except MoekitError:
            continue
        had.append(name)
    return dict(trace.require(had)) if had else {}
