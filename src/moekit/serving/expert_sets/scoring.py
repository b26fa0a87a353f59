"""From what was recorded of a task's text to its expert set.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from moekit import catalogue
from moekit.anatomy.probe import Geometry, find_moe_layers
from moekit.compress.engine.dropping import PruneMethod, ranking
from moekit.compress.engine.inputs import LayerInputs
from moekit.errors import BadConfig, BadData
from moekit.serving.expert_sets.expert_set import ExpertSet, make_expert_set
from moekit.trace.meta import DataEntry
from moekit.trace.statistics import LayerStatistics
from moekit.trace.store import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_method(method: PruneMethod) -> None:
    """Refuse methods that give no ranks, or look at more than what the router shows of a text.

    Raises:
        BadConfig: with the reason.
    """
    cls = type(method)
    name = catalogue.of(cls).name
    reason = None
    if cls.searches:
        reason = "decides by trying subsets on the whole text, for one budget"
    elif cls.rewrites:
        reason = "changes the weights of experts that stay, so each task would need a model of its own"
    elif cls.reads_weights:
        reason = "reads the weights of all experts, which a loader of some of them does not have"
    elif cls.decide is not PruneMethod.decide:
        reason = "chooses sets, not ranks, so one expert set cannot serve every budget"
    elif not method.required:
        reason = "looks at no text, so all tasks would have the same expert set"
    if reason is not None:
        raise BadConfig(f"{name} {reason}", hint="take a method that scores from statistics, such as premoe")


def score_layers(
    method: PruneMethod, statistics: Mapping[int, LayerStatistics], geometries: Mapping[int, Geometry]
) -> dict[int, Tensor]:
    """Score layers by a method that looks at statistics alone: decoder layer -> [E].

    Raises:
        BadData: statistics of a layer that the model has not.
    """
    if strange := sorted(set(statistics) - set(geometries)):
        raise BadData("the model has no such MoE layer", layer=strange[0], hint="trace the model itself")
    return {layer: method.score(LayerInputs(layer, geometries[layer], found)) for layer, found in statistics.items()}


def from_statistics(
    task: str,
    statistics: Mapping[int, LayerStatistics],
    geometries: Mapping[int, Geometry],
    method: PruneMethod,
    *,
    data: Sequence[DataEntry] = (),
    fingerprint: str = "",
    further: bool = True,
) -> ExpertSet:
    """An expert set from the statistics of the task's text.

    Args:
        task: its name.
        statistics: decoder layer -> what the method needs, and the load, which tells what no token chose.
        geometries: decoder layer -> sizes of its MoE block.
        method: scores from statistics alone; see `check_method`.
        data: the text.
        fingerprint: of the model.
        further: see `make_expert_set`.

    Raises:
        BadConfig: a method that gives no ranks.
        BadData: statistics of other layers, or without the load.
        NumericFault: a score is not finite.
    """
    check_method(method)
    scores = score_layers(method, statistics, geometries)
    for layer, scores_E in scores.items():
        # Refuses scores that are not finite, and says which.
        ranking(scores_E, LayerInputs(layer, geometries[layer], statistics[layer]))
    return make_expert_set(
        task,
        scores,
        tokens=max((found.tokens for found in statistics.values()), default=0),
        never_routed={layer: (found.load_E == 0).nonzero().flatten().tolist() for layer, found in statistics.items()},
        data=data,
        fingerprint=fingerprint,
        method=catalogue.of(type(method)).name,
        knobs=method.model_dump(mode="json"),
        keep_further=further,
    )


def expert_set_of(
    task: str, model: PreTrainedModel, trace: Trace, method: PruneMethod, *, further: bool = True
) -> ExpertSet:
    """An expert set from a trace of the task's text.

    Experts that no token of the trace chose rank behind all others, as the load tells; see the top of this file.

    Args:
        task: its name.
        model: that was traced.
        trace: with the statistics the method needs, and the load.
        method: scores from statistics alone, such as `PreMoe()`.
        further: see `make_expert_set`.

    Raises:
        BadConfig: a method that gives no ranks.
        BadData: the trace lacks statistics.
    """
    return from_statistics(
        task,
        trace.require(dict.fromkeys((*method.required, "load"))),
        {layer.index: layer.geometry for layer in find_moe_layers(model)},
        method,
        data=trace.meta.data,
        fingerprint=trace.meta.fingerprint,
        further=further,
    )
