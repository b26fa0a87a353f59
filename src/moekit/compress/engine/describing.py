"""The readable part of a plan, put together from what was decided.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from moekit import catalogue
from moekit.anatomy.probe import experts_beside
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.budget.bits import BitBudget
from moekit.compress.budget.parents import expert_weights
from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import LayerRecord, PlanFile
from moekit.compress.engine.request import PlanRequest
from moekit.trace.meta import DataEntry, TraceMeta


def layer_record(inputs: LayerInputs, scores_E: Tensor, outcome: LayerOutcome) -> LayerRecord:
    """The readable part of what was decided for one layer."""
    return LayerRecord(
        experts=inputs.experts,
        hidden=inputs.geometry.hidden,
        width=inputs.geometry.width,
        scores=tuple(scores_E.double().tolist()),
        never_routed=tuple(inputs.statistics.never_routed),
        outcome=outcome,
    )


def plan_file(
    checkpoint: Checkpoint,
    request: PlanRequest,
    layers: Mapping[int, LayerRecord],
    meta: TraceMeta | None,
    digest: str = "",
) -> PlanFile:
    """The readable part of a plan, with what a reader must know."""
    record, budget = catalogue.of(type(request.method)), request.budget
    if isinstance(budget, SparsityBudget | BitBudget):
        budget = budget.model_copy(update={"weights": expert_weights(geometries_of(checkpoint))})
    data = () if meta is None else tuple(meta.data)
    return PlanFile(
        kind=record.kind,
        method=record.name,
        settings=request.method.model_dump(mode="json"),
        budget=budget,
        top_k=request.top_k,
        groups=request.groups,
        seed=request.seed,
        model=str(checkpoint.path),
        fingerprint=checkpoint.fingerprint,
        trace=digest,
        data=data,
        tokens=0 if meta is None else meta.tokens,
        domains=() if meta is None else tuple(meta.domains),
        repair=request.repair,
        protected={layer: tuple(sorted(experts)) for layer, experts in (request.protected or {}).items()},
        layers=dict(layers),
        warnings=warnings_of(request.method, layers, data),
    )


def warnings_of(
    method: WeightMethod[object, int], layers: Mapping[int, LayerRecord], data: Sequence[DataEntry]
) -> tuple[str, ...]:
    """What a reader of a plan must know."""
    found = [
        f"layer {layer}: {len(told.never_routed)} of {told.experts} experts were never routed in the calibration text"
        f"{method.unseen(told.never_routed, told.outcome)}"
        for layer, told in layers.items()
        if told.never_routed
    ]
    if sum(entry.documents for entry in data) == 1:
        found.append("the calibration text is a single document: what it says of experts may hold for it alone")
    return tuple(found)


def beside_warnings(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a reader must know of experts beside the language model's: a talker has its own."""
    beside = experts_beside(empty_model(checkpoint))
    told = f"{len(beside)} MoE blocks beside the language model stay as they are, such as {beside[0]}" if beside else ""
    return (told,) if told else ()


def mtp_warnings(prefixes: Iterable[str]) -> tuple[str, ...]:
    """What a reader of a plan must know of how experts of multi-token-prediction layers are chosen."""
    return tuple(
        f"the experts of the multi-token-prediction layer {prefix}* are ranked by the gate weights that its own router "
        "gives them on the text, behind the decoder as it was; how often its guesses still hold was not measured"
        for prefix in prefixes
    )
