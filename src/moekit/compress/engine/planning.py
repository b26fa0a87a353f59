"""From statistics, or a text, to a plan: score every layer, share the budget, decide.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from moekit import catalogue
from moekit._progress import Progress, track
from moekit.anatomy.probe import Geometry
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.bit_sharing import with_widths
from moekit.compress.engine.describing import beside_warnings, layer_record, mtp_warnings, plan_file, warnings_of
from moekit.compress.engine.inputs import InputsByLayer
from moekit.compress.engine.made_layers import MadeLayers
from moekit.compress.engine.measuring import empty_statistics, geometries_of, refuse_damaged, sizes_of, weights_reader
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.plan import LayerRecord, WeightPlan
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite, rewriter
from moekit.compress.engine.searching import plan_by_search
from moekit.compress.engine.sequential import Decide, TextPass, pass_name
from moekit.errors import BadConfig, BadData
from moekit.trace.meta import TraceMeta
from moekit.trace.statistics import LayerStatistics
from moekit.trace.store import Trace
from moekit.trace.streamed import Streamed


def plan_weights(
    checkpoint: Checkpoint,
    source: Trace | CalibrationText | None,
    request: PlanRequest,
    progress: Progress | None = None,
) -> WeightPlan:
    """Score every layer, share the budget and decide, whatever the kind of method.

    Args:
        checkpoint: what is to change; its layers may hold different numbers of experts.
        source: a trace of this checkpoint with what the method needs, or a text to calibrate on; None for methods that
            need nothing. Methods that follow the changed layers, or that search, need a text.
        request: method, budget and the rest.
        progress: told layer by layer.

    Raises:
        BadData: the trace is of another model, or lacks what the method needs; no token reached the experts.
        BadConfig: the budget is impossible, or the method needs what was not given.
        NumericFault: a score is not finite; names layer and expert.
        UnsupportedModel: no Mixture of Experts, or quantized in a way that is not read here.
    """
    request = with_widths(checkpoint, source, request, progress, _rounding(checkpoint, source, progress))
    method, geometries = request.method, geometries_of(checkpoint)
    if isinstance(source, CalibrationText) and method.passes == "search":
        with Streamed(
            checkpoint,
            source.batches,
            statistics=("load",),
            folder=source.folder,
            dtype=source.dtype,
            device=source.device,
        ) as streamed:
            streamed.run(progress, refuse_damaged)
            recorded = streamed.trace(tokenizer=source.tokenizer, source=source.source, seed=request.seed)
            return plan_by_search(checkpoint, recorded, streamed, request, progress)
    if isinstance(source, CalibrationText) and method.required:
        return _plan_on_text(checkpoint, source, request, geometries, progress)
    if method.passes == "search" or (method.sequential and isinstance(source, Trace)):
        raise BadConfig(
            f"{catalogue.of(type(method)).name} decides by running layers on text, which no trace holds",
            hint="give text (--data)",
        )
    trace = source if isinstance(source, Trace) else None
    statistics = needed_statistics(checkpoint, trace, method, geometries)
    return decide(checkpoint, inputs_of(checkpoint, request, geometries, statistics), request, statistics, trace)


def _rounding(
    checkpoint: Checkpoint, source: Trace | CalibrationText | None, progress: Progress | None
) -> Callable[[PlanRequest], PlannedRewrite]:
    """Plans what a request of shared bits asks for, and gives what carries it out."""

    def rounded(request: PlanRequest) -> PlannedRewrite:
        made = rewriter(plan_weights(checkpoint, source, request, progress), checkpoint)
        assert made is not None  # methods that round make new weights
        return made

    return rounded


def _plan_on_text(
    checkpoint: Checkpoint,
    text: CalibrationText,
    request: PlanRequest,
    geometries: Mapping[int, Geometry],
    progress: Progress | None,
) -> WeightPlan:
    """Measure the model as it is; for sequential methods then again, behind the layers as they become."""
    method, behind = request.method, request.method.sequential and request.method.decides_behind
    found, meta, passing = empty_statistics(geometries), None, TextPass(checkpoint, text, request, progress)
    run = passing.run
    by_scores = isinstance(request.budget, Budget) and request.budget.scope == "global"
    if not method.sequential or method.shares_by_measure or (behind and by_scores):
        found, meta = run("plain", None)
    inputs = inputs_of(checkpoint, request, geometries, found)
    # An equal share for each layer asks for no scores, which are taken where the layer is decided.
    scores, shares = _shares(checkpoint, inputs, request, {} if behind and not by_scores else None)
    if method.sequential:
        if behind:
            name, decide = pass_name(request, shares), _decider(method, shares)
        else:
            outcomes = {layer: method.decide(inputs[layer], scores[layer], shares[layer]) for layer in inputs}
            name, decide = pass_name(request, outcomes), lambda seen: outcomes[seen.layer]
        fewer = isinstance(request.budget, Budget) and any(shares[n] != geometries[n].experts for n in shares)
        found, meta = run(name, decide, dropped=fewer)
        inputs = inputs_of(checkpoint, request, geometries, found)
    if behind:
        scores = {layer: method.worth(inputs[layer]) for layer in inputs}
    return _decided(checkpoint, inputs, request, found, scores, shares, meta, made=passing.made)


def _decider(method: WeightMethod[Any, Any], shares: Mapping[int, Any]) -> Decide:
    """Scores and decides a layer by what it shows: the same as `_decided` makes of the same statistics afterwards."""
    return lambda seen: method.decide(seen, method.worth(seen), shares[seen.layer])


def inputs_of(
    checkpoint: Checkpoint,
    request: PlanRequest,
    geometries: Mapping[int, Geometry],
    statistics: Mapping[int, LayerStatistics],
) -> InputsByLayer:
    """What the method sees of every layer."""
    read = weights_reader(checkpoint) if request.method.reads_weights else None
    return InputsByLayer(geometries, statistics, read, request.seed, request.protected)


def needed_statistics(
    checkpoint: Checkpoint, trace: Trace | None, method: WeightMethod[object, int], geometries: Mapping[int, Geometry]
) -> dict[int, LayerStatistics]:
    """What a method needs, of every layer.

    Raises:
        BadData: the trace is of another model, or lacks it.
        BadConfig: there is no trace, and the method needs one.
    """
    if trace is None:
        if method.required:
            raise BadConfig(
                f"{catalogue.of(type(method)).name} decides from {', '.join(method.required)}",
                hint="give a text (--data) or a trace (--trace) of this model",
            )
        return empty_statistics(geometries)
    trace.check_model(checkpoint.fingerprint)
    found = trace.require(method.required)
    if missing := sorted(geometries.keys() - found.keys()):
        raise BadData(
            f"the trace holds nothing of {len(missing)} of {len(geometries)} MoE layers",
            layer=missing[0],
            hint="record all layers",
        )
    return {layer: found[layer] for layer in geometries}


def decide(
    checkpoint: Checkpoint,
    inputs: InputsByLayer,
    request: PlanRequest,
    statistics: Mapping[int, LayerStatistics],
    trace: Trace | None,
    scores: Mapping[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> WeightPlan:
    """Score, share the budget by the scores and decide every layer.

    Args:
        checkpoint: what is to change.
        inputs: of every layer.
        request: method, budget and the rest.
        statistics: that stay with the plan.
        trace: that they come from.
        scores: of every layer, where they are known.
        progress: told layer by layer.
    """
    scores, shares = _shares(checkpoint, inputs, request, scores, progress)
    digest = "" if trace is None else trace.digest
    meta = None if trace is None else trace.meta
    return _decided(checkpoint, inputs, request, statistics, scores, shares, meta, digest)


def _shares(
    checkpoint: Checkpoint,
    inputs: InputsByLayer,
    request: PlanRequest,
    scores: Mapping[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> tuple[Mapping[int, Tensor], dict[int, int]]:
    """Scores, and what each layer gets of the budget.

    Raises:
        BadConfig: the budget is impossible, or protects more than may stay, or what is not there.
    """
    _check_protected(inputs, request.protected or {})
    if scores is None:
        scores = {layer: request.method.worth(inputs[layer]) for layer in track(inputs, "scoring experts", progress)}
    geometries = {layer: inputs[layer].geometry for layer in inputs}
    sizes = sizes_of(checkpoint, geometries, request.top_k, redirects=request.method.redirects)
    shares = request.method.allocate(inputs, scores, request.budget, sizes)
    for layer, count in shares.items():
        protected = inputs[layer].protected
        if isinstance(request.budget, Budget) and len(protected) > count:
            raise BadConfig(
                f"{len(protected)} experts are protected, but {count} may stay",
                layer=layer,
                hint=f"keep at least {len(protected)}, or protect fewer",
            )
    return scores, shares


def _check_protected(inputs: InputsByLayer, protected: Mapping[int, Collection[int]]) -> None:
    for layer, experts in protected.items():
        there = inputs[layer].experts if layer in inputs else 0
        if missing := [expert for expert in experts if not 0 <= expert < there]:
            raise BadConfig(f"a protected expert is not there: of {there}", layer=layer, expert=missing[0])


def _decided(
    checkpoint: Checkpoint,
    inputs: InputsByLayer,
    request: PlanRequest,
    statistics: Mapping[int, LayerStatistics],
    scores: Mapping[int, Tensor],
    shares: Mapping[int, int],
    meta: TraceMeta | None,
    digest: str = "",
    made: MadeLayers | None = None,
) -> WeightPlan:
    layers: dict[int, LayerRecord] = {}
    for layer in inputs:
        seen = inputs[layer]
        layers[layer] = layer_record(seen, scores[layer], request.method.decide(seen, scores[layer], shares[layer]))
    file = plan_file(checkpoint, request, layers, meta, digest)
    if made is not None:
        file = file.model_copy(update={"made": made.digests(layers)})
    return WeightPlan(file, statistics, made)


def redecide(plan: WeightPlan, checkpoint: Checkpoint, budget: Budget) -> WeightPlan:
    """Another budget from the same scores, without a new pass over the text.

    Raises:
        BadConfig: another model, an impossible budget, or a method that decides by trying, or layer after layer.
    """
    plan.check_model(checkpoint.fingerprint, checkpoint.path)
    file, method = plan.file, plan.method
    if method.searches or method.sequential:
        raise BadConfig(
            f"{file.method} decided layer after layer on the text: another budget needs another search",
            hint=f"run moekit {file.kind} again",
        )
    request = PlanRequest(method, budget, file.top_k, file.groups, file.seed, file.protected, file.repair)
    inputs = inputs_of(checkpoint, request, geometries_of(checkpoint), plan.statistics)
    scores = {layer: torch.tensor(told.scores, dtype=torch.float64) for layer, told in file.layers.items()}
    made = decide(checkpoint, inputs, request, plan.statistics, None, scores)
    kept: dict[str, object] = {"trace": file.trace, "data": file.data, "tokens": file.tokens, "domains": file.domains}
    told = (*warnings_of(method, made.file.layers, file.data), *mtp_warnings(file.mtp), *beside_warnings(checkpoint))
    kept |= {"mtp": file.mtp, "warnings": told}
    return WeightPlan(made.file.model_copy(update=kept), plan.statistics)
