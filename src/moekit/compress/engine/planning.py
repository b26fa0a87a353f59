"""From statistics to a plan: score every layer, share the budget, decide.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moekit import catalogue
from moekit._progress import Progress, track
from moekit.anatomy.layout import find_expert_tensors
from moekit.anatomy.probe import Geometry, find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import config_top_k
from moekit.checkpoint.precision import stored_dtype
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.budget.sizes import Budget, Sizes, bounds, check_count, check_total, total_count, uniform_count
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerDecision
from moekit.compress.engine.plan import LayerPlan, PlanFile, PrunePlan
from moekit.compress.engine.resize import Groups, read_block
from moekit.compress.engine.slicing import is_mtp
from moekit.compress.engine.weights import LayerWeights
from moekit.errors import BadConfig, BadData
from moekit.streaming.loader import LayerLoader
from moekit.streaming.walk import layer_of
from moekit.trace.meta import DataEntry
from moekit.trace.statistics import LayerStatistics
from moekit.trace.store import Trace

Protected = Mapping[int, Collection[int]]


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        method: the method.
        budget: what may stay.
        top_k: choices a token makes afterwards; None as before.
        groups: "free" or "equal"; see `PlanFile`.
        seed: of everything random.
        protected: decoder layer -> experts that stay whatever their score.
    """

    method: PruneMethod
    budget: Budget
    top_k: int | None = None
    groups: Groups = "free"
    seed: int = 0
    protected: Protected | None = None


class InputsByLayer(Mapping[int, LayerInputs]):
    """What a method sees of every layer, made anew each time it is asked: no layer's weights stay in memory."""

    def __init__(
        self,
        geometries: Mapping[int, Geometry],
        statistics: Mapping[int, LayerStatistics],
        request: Request,
        read_weights: Callable[[int], LayerWeights] | None,
    ) -> None:
        self._geometries = geometries
        self._statistics = statistics
        self._request = request
        self._read = read_weights

    def __getitem__(self, layer: int) -> LayerInputs:
        read, protected = self._read, (self._request.protected or {}).get(layer, ())
        return LayerInputs(
            layer,
            self._geometries[layer],
            self._statistics[layer],
            None if read is None else lambda: read(layer),
            self._request.seed,
            frozenset(protected),
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self._geometries)

    def __len__(self) -> int:
        return len(self._geometries)


def geometries_of(checkpoint: Checkpoint) -> dict[int, Geometry]:
    """Decoder layer -> sizes of its MoE block, from the config alone."""
    return {layer.index: layer.geometry for layer in find_moe_layers(empty_model(checkpoint))}


def sizes_of(checkpoint: Checkpoint, geometries: Mapping[int, Geometry], top_k: int | None = None) -> Sizes:
    """What a budget is counted against; multi-token-prediction layers are left out, as they are when it is written."""
    left_out = is_mtp(checkpoint)
    layout = find_expert_tensors(checkpoint.tensors)
    bytes_of = dict.fromkeys(geometries, 0)
    for tensors in layout.experts.values():
        if tensors[0].layer in bytes_of and not left_out(tensors[0].name):
            bytes_of[tensors[0].layer] += sum(checkpoint.tensors[t.name].nbytes for t in tensors)
    experts = {layer: geometry.experts for layer, geometry in geometries.items()}
    choices = top_k or config_top_k(checkpoint.config) or max(g.top_k for g in geometries.values())
    routed = sum(bytes_of.values())
    each = {layer: nbytes // experts[layer] for layer, nbytes in bytes_of.items()}
    others = sum(info.nbytes for name, info in checkpoint.tensors.items() if not left_out(name)) - routed
    return Sizes(experts, choices, each, others)


def weights_reader(checkpoint: Checkpoint) -> Callable[[int], LayerWeights]:
    """Reads one layer's routed experts and router from disk."""
    # As stored: what is merged when the plan is carried out must be what was measured here.
    loader = LayerLoader(checkpoint, dtype=stored_dtype(checkpoint.config, checkpoint.tensors), device="cpu")

    def read(layer: int) -> LayerWeights:
        with loader.loaded(layer):
            return read_block(layer_of(loader, layer))

    return read


def plan_pruning(
    checkpoint: Checkpoint, trace: Trace | None, request: Request, progress: Progress | None = None
) -> PrunePlan:
    """Score every layer and decide.

    Args:
        checkpoint: what is to be pruned.
        trace: of this checkpoint, with what the method needs; None for methods that need nothing.
        request: method, budget and the rest.
        progress: told layer by layer.

    Raises:
        BadData: the trace is of another model, or lacks what the method needs.
        BadConfig: the budget is impossible.
        NumericFault: a score is not finite; names layer and expert.
    """
    method = request.method
    if method.searches:
        raise BadConfig(
            f"{catalogue.of(type(method)).name} decides by trying, which needs the model and the text",
            hint="use moekit.compress.prune.search_pruning (moekit prune does)",
        )
    geometries = geometries_of(checkpoint)
    statistics = needed_statistics(checkpoint, trace, method, geometries)
    read = weights_reader(checkpoint) if method.reads_weights else None
    inputs = InputsByLayer(geometries, statistics, request, read)
    scores = {layer: method.score(inputs[layer]) for layer in track(inputs, "scoring experts", progress)}
    return decide(checkpoint, inputs, scores, request, statistics, trace)


def needed_statistics(
    checkpoint: Checkpoint, trace: Trace | None, method: PruneMethod, geometries: Mapping[int, Geometry]
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
        return {layer: LayerStatistics(g.experts, g.hidden, width=g.width) for layer, g in geometries.items()}
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
    scores: Mapping[int, Tensor],
    request: Request,
    statistics: Mapping[int, LayerStatistics],
    trace: Trace | None,
) -> PrunePlan:
    """Share the budget by the scores and decide every layer."""
    method = request.method
    counts = count_layers(checkpoint, inputs, scores, request)
    layers = {
        layer: layer_plan(inputs[layer], scores[layer], method.decide(inputs[layer], scores[layer], counts[layer]))
        for layer in inputs
    }
    return PrunePlan(plan_file(checkpoint, request, layers, trace), statistics)


def count_layers(
    checkpoint: Checkpoint, inputs: InputsByLayer, scores: Mapping[int, Tensor], request: Request
) -> dict[int, int]:
    """Experts that each layer keeps.

    Raises:
        BadConfig: the budget is impossible, or protects more than may stay, or what is not there.
    """
    for layer, experts in (request.protected or {}).items():
        there = inputs[layer].experts if layer in inputs else 0
        if missing := [expert for expert in experts if not 0 <= expert < there]:
            raise BadConfig(f"a protected expert is not there: of {there}", layer=layer, expert=missing[0])
    sizes = sizes_of(checkpoint, {layer: inputs[layer].geometry for layer in inputs}, request.top_k)
    if request.budget.scope == "uniform":
        counts = uniform_count(request.budget, sizes)
    else:
        least, most = bounds(request.budget, sizes)
        total = total_count(request.budget, sizes)
        check_total(total, least, most, sizes)
        counts = request.method.allocate(inputs, scores, total, least, most)
        for layer, count in counts.items():
            check_count(count, sizes.experts[layer], sizes.top_k, layer)
    for layer, count in counts.items():
        protected = inputs[layer].protected
        if len(protected) > count:
            raise BadConfig(
                f"{len(protected)} experts are protected, but {count} may stay",
                layer=layer,
                hint=f"keep at least {len(protected)}, or protect fewer",
            )
    return counts


def layer_plan(inputs: LayerInputs, scores_E: Tensor, decision: LayerDecision) -> LayerPlan:
    """The readable part of what was decided for one layer."""
    return LayerPlan(
        experts=inputs.experts,
        hidden=inputs.geometry.hidden,
        width=inputs.geometry.width,
        scores=tuple(scores_E.double().tolist()),
        never_routed=tuple(inputs.statistics.never_routed),
        decision=decision,
    )


def plan_file(
    checkpoint: Checkpoint, request: Request, layers: Mapping[int, LayerPlan], trace: Trace | None
) -> PlanFile:
    """The readable part of a plan, with what a reader must know."""
    record = catalogue.of(type(request.method))
    meta = None if trace is None else trace.meta
    data = () if meta is None else tuple(meta.data)
    return PlanFile(
        method=record.name,
        settings=request.method.model_dump(mode="json"),
        budget=request.budget,
        top_k=request.top_k,
        groups=request.groups,
        seed=request.seed,
        model=str(checkpoint.path),
        fingerprint=checkpoint.fingerprint,
        trace="" if trace is None else trace.digest,
        data=data,
        tokens=0 if meta is None else meta.tokens,
        domains=() if meta is None else tuple(meta.domains),
        protected={layer: tuple(sorted(experts)) for layer, experts in (request.protected or {}).items()},
        layers=dict(layers),
        warnings=_warnings(layers, data),
    )


def _warnings(layers: Mapping[int, LayerPlan], data: Sequence[DataEntry]) -> tuple[str, ...]:
    """What a reader of a plan must know."""
    found = [
        f"layer {layer}: {len(plan.never_routed)} of {plan.experts} experts were never routed in the calibration text; "
        f"they rank below all others, and {kept} of them stay"
        for layer, plan in layers.items()
        if plan.never_routed
        for kept in [len(set(plan.never_routed) & set(plan.decision.keep))]
    ]
    if sum(entry.documents for entry in data) == 1:
        found.append("the calibration text is a single document: its experts may be those of that document alone")
    return tuple(found)


def redecide(plan: PrunePlan, checkpoint: Checkpoint, budget: Budget) -> PrunePlan:
    """Another budget from the same scores, without a new pass over the text.

    Raises:
        BadConfig: another model, an impossible budget, or a method that decides by trying.
    """
    import torch

    plan.check_model(checkpoint.fingerprint, checkpoint.path)
    file, method = plan.file, plan.method
    if method.searches:
        raise BadConfig(
            f"{file.method} decided by trying {file.budget.keep}: another budget needs another search",
            hint="run moekit prune again",
        )
    request = Request(method, budget, file.top_k, file.groups, file.seed, file.protected)
    geometries = geometries_of(checkpoint)
    read = weights_reader(checkpoint) if method.reads_weights else None
    inputs = InputsByLayer(geometries, plan.statistics, request, read)
    scores = {layer: torch.tensor(p.scores, dtype=torch.float64) for layer, p in file.layers.items()}
    made = decide(checkpoint, inputs, scores, request, plan.statistics, None)
    kept = {"trace": file.trace, "data": file.data, "tokens": file.tokens, "domains": file.domains}
    kept |= {"warnings": _warnings(made.file.layers, file.data)}
    return PrunePlan(made.file.model_copy(update=kept), plan.statistics)
