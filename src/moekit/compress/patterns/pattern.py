"""Patterns: what each task wants of every layer's experts, small enough to keep one for every task.

A pattern is the score vector z of the first MoE layer and for each further layer l a permutation with
perm_l[argsort(z)[rank]] = argsort(score_l)[rank], both descending (arXiv:2505.17639). So {perm_l[e] : e in top-M(z)} is
the top M of layer l for every M: one file serves all budgets. `moekit.compress.patterns.store` keeps patterns on disk,
`moekit.compress.patterns.retrieval` finds the one that a prompt belongs to.

Legend: L MoE layers, E experts, M experts kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from moekit import catalogue
from moekit.anatomy.probe import Geometry, find_moe_layers
from moekit.compress.evidence import LayerEvidence
from moekit.compress.prune.base import PruneMethod
from moekit.errors import BadConfig, BadData, NumericFault, UnsupportedModel
from moekit.trace.meta import DataEntry
from moekit.trace.statistics import LayerStatistics
from moekit.trace.store import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_EXPERTS = 32_767


class Origin(BaseModel):
    """What must be equal for two patterns to be comparable.

    Attributes:
        fingerprint: of the model; "" if unknown.
        method: name of the pruning method that scored.
        knobs: its settings.
        layers: decoder layers, ascending.
        experts: E of each of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str = ""
    method: str = ""
    knobs: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[int, ...] = Field(min_length=1)
    experts: int = Field(ge=1, le=MAX_EXPERTS)

    @model_validator(mode="after")
    def _ascending(self) -> Origin:
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError("layers must be ascending and distinct")
        return self


@dataclass(frozen=True, eq=False)
class Pattern:
    """What one task wants of every layer's experts.

    Attributes:
        task: its name.
        origin: of which model, by which method.
        tokens: how many the scores are means over.
        data: the text they come from.
        first_E: scores of the first MoE layer, fp64.
        permutations: [L-1, E] int64, which expert of each further layer has the rank of expert e in the first.
        further: scores of the further layers, [L-1, E] fp64; None where they were not kept.
    """

    task: str
    origin: Origin
    tokens: int
    data: tuple[DataEntry, ...]
    first_E: Tensor
    permutations: Tensor
    further: Tensor | None = None

    def scores(self, layers: int) -> Tensor:
        """Scores of the first `layers` MoE layers, [layers, E].

        Raises:
            BadData: so many layers were not kept.
        """
        if layers == 1:
            return self.first_E[None]
        known = 0 if self.further is None else len(self.further)
        if self.further is None or layers > 1 + known:
            raise BadData(
                f"the pattern {self.task!r} holds scores of {1 + known} layer(s), not of {layers}",
                hint="compare fewer layers, or make the pattern with further scores kept",
            )
        return torch.cat([self.first_E[None], self.further[: layers - 1]])


def ranked(scores_E: Tensor) -> Tensor:
    """Experts by falling score, [E] int64; of equal scores the lower number first."""
    return scores_E.sort(descending=True, stable=True).indices


def make_pattern(
    task: str,
    scores: Mapping[int, Tensor],
    *,
    tokens: int,
    data: Sequence[DataEntry] = (),
    fingerprint: str = "",
    method: str = "",
    knobs: Mapping[str, Any] | None = None,
    keep_further: bool = True,
) -> Pattern:
    """A pattern from the scores of all layers.

    Args:
        task: its name.
        scores: decoder layer -> [E].
        tokens: how many the scores are means over.
        data: the text they come from.
        fingerprint: of the model.
        method: that scored.
        knobs: its settings.
        keep_further: keep the scores of layers after the first, 8 E bytes each; without them only the first layer can
            be compared, and tasks cannot be pooled.

    Raises:
        BadData: no layers.
        UnsupportedModel: layers with different numbers of experts, which no permutation carries into each other.
        NumericFault: a score is NaN or infinite.
    """
    if not scores:
        raise BadData("there are no layers to make a pattern of")
    layers = sorted(scores)
    first = layers[0]
    for layer in layers:
        if scores[layer].shape != scores[first].shape:
            raise UnsupportedModel(
                f"{len(scores[layer])} experts here, but {len(scores[first])} in layer {first}",
                layer=layer,
                hint="a pattern carries ranks over: make it of the model before layers are pruned unevenly",
            )
        if not bool(scores[layer].isfinite().all()):
            expert = int((~scores[layer].isfinite()).nonzero()[0])
            raise NumericFault("the score is not finite", layer=layer, expert=expert)
    table = torch.stack([scores[layer].detach().double().cpu() for layer in layers])
    order_E = ranked(table[0])
    permutations = torch.empty(len(layers) - 1, table.shape[1], dtype=torch.int64)
    for row, scores_E in zip(permutations, table[1:], strict=True):
        row[order_E] = ranked(scores_E)
    origin = Origin(
        fingerprint=fingerprint,
        method=method,
        knobs=dict(knobs or {}),
        layers=tuple(layers),
        experts=table.shape[1],
    )
    return Pattern(task, origin, tokens, tuple(data), table[0], permutations, table[1:] if keep_further else None)


def score_layers(
    method: PruneMethod, statistics: Mapping[int, LayerStatistics], geometries: Mapping[int, Geometry]
) -> dict[int, Tensor]:
    """Score layers by a method that looks at statistics alone: decoder layer -> [E].

    Raises:
        BadData: statistics of a layer that the model has not.
    """
    if strange := sorted(set(statistics) - set(geometries)):
        raise BadData("the model has no such MoE layer", layer=strange[0], hint="trace the model itself")
    return {layer: method.score(LayerEvidence(layer, geometries[layer], found)) for layer, found in statistics.items()}


def pattern_of(
    task: str, model: PreTrainedModel, trace: Trace, method: PruneMethod, *, further: bool = True
) -> Pattern:
    """A pattern from a trace of the task's text.

    Args:
        task: its name.
        model: that was traced.
        trace: with the statistics the method needs.
        method: scores from statistics alone, such as `PreMoe()`.
        further: see `make_pattern`.

    Raises:
        BadData: the trace lacks statistics.
    """
    geometries = {layer.index: layer.geometry for layer in find_moe_layers(model)}
    return make_pattern(
        task,
        score_layers(method, trace.require(method.required), geometries),
        tokens=trace.meta.tokens,
        data=trace.meta.data,
        fingerprint=trace.meta.fingerprint,
        method=catalogue.of(type(method)).name,
        knobs=method.model_dump(mode="json"),
        keep_further=further,
    )


def keep_sets(
    pattern: Pattern, keep: int, *, protected: Mapping[int, Collection[int]] | None = None
) -> dict[int, list[int]]:
    """Which experts of each layer to load for a task: decoder layer -> ascending experts.

    Args:
        pattern: of the task.
        keep: M, experts of each layer.
        protected: decoder layer -> experts that stay whatever their score; they count towards M.

    Raises:
        BadConfig: M outside 1..E, or protected experts that do not exist or are more than stay.
    """
    experts = pattern.origin.experts
    if not 1 <= keep <= experts:
        raise BadConfig(f"{keep} experts of {experts}", hint=f"keep 1 to {experts} a layer")
    order_E = ranked(pattern.first_E)
    sets = {}
    for number, layer in enumerate(pattern.origin.layers):
        order = (pattern.permutations[number - 1][order_E] if number else order_E).tolist()
        always = set((protected or {}).get(layer, ()))
        if len(always) > keep or not always <= set(order):
            raise BadConfig(
                f"experts {sorted(always)} are protected, of {experts} of which {keep} stay",
                layer=layer,
                hint="keep more experts, or protect fewer",
            )
        rest = [expert for expert in order if expert not in always]
        sets[layer] = sorted([*always, *rest[: keep - len(always)]])
    return sets


def generalist(patterns: Sequence[Pattern], task: str = "generalist") -> Pattern:
    """One pattern of several tasks: their sums over tokens added, then divided by all tokens (not a union of top sets).

    For scores that are means over all tokens, as PreMoe's. An adaptive threshold stays each task's own; to have one for
    all, merge the traces instead.

    Raises:
        BadData: no patterns, of different models or methods, without tokens, or without further scores.
    """
    if not patterns:
        raise BadData("there are no patterns to pool", hint="give at least one")
    origin = patterns[0].origin
    for pattern in patterns:
        check_same(origin, pattern.origin)
    tokens = sum(pattern.tokens for pattern in patterns)
    if not tokens:
        raise BadData("the patterns to pool are of no tokens", hint="record some text of each task")
    pooled = sum((p.scores(len(origin.layers)) * p.tokens for p in patterns), torch.zeros(())) / tokens
    return make_pattern(
        task,
        dict(zip(origin.layers, pooled, strict=True)),
        tokens=tokens,
        data=[entry for pattern in patterns for entry in pattern.data],
        fingerprint=origin.fingerprint,
        method=origin.method,
        knobs=origin.knobs,
    )


def check_same(first: Origin, second: Origin, file: Path | None = None) -> None:
    """Refuse patterns that cannot be compared.

    Raises:
        BadData: they are of different models, methods, settings or layers.
    """
    for name in Origin.model_fields:
        left, right = getattr(first, name), getattr(second, name)
        if left != right:
            raise BadData(
                f"patterns with {name} {left!r} and {right!r} cannot be compared",
                file=file,
                hint="keep patterns of each model and method in a folder of their own",
            )
