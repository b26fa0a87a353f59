"""Expert sets: what each task wants of every layer's experts, small enough to keep one for every task.

An expert set is the score vector z of the first MoE layer and for each further layer l a permutation with
perm_l[argsort(z)[rank]] = argsort(score_l)[rank], both descending (arXiv:2505.17639). So {perm_l[e] : e in top-M(z)} is
the top M of layer l for every M: one file serves all budgets. `store` keeps expert sets on disk, `retrieval` finds the
one that a prompt belongs to, `loading` loads its experts alone.

Ranks are not scores alone: an expert that no token of the task chose may score higher than one that was chosen (a
chosen expert whose tokens all lie below PreMoe's threshold scores 0, one of negative logits less), and yet the text
says nothing of it. So experts that no token chose rank behind all others, in every layer, whatever they score; a
expert set keeps the ranks beside the scores, and how many experts of each layer were chosen at all.

Legend: L MoE layers, E experts, M experts kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from moekit.errors import BadConfig, BadData, NumericFault, UnsupportedModel
from moekit.trace.meta import DataEntry

MAX_EXPERTS = 32_767
# Name of the pooled expert set; no task of its own.
GENERALIST = "generalist"


class Origin(BaseModel):
    """What must be equal for two expert sets to be comparable.

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
class ExpertSet:
    """What one task wants of every layer's experts.

    Attributes:
        task: its name.
        origin: of which model, by which method.
        tokens: how many the scores are means over.
        data: the text they come from.
        first_E: scores of the first MoE layer, fp64.
        order_E: experts of the first MoE layer by rank, best first, int64; those that no token chose come last.
        permutations: [L-1, E] int64, which expert of each further layer has the rank of expert e in the first.
        chosen: of each layer, how many experts some token chose: those of the first ranks.
        further: scores of the further layers, [L-1, E] fp64; None where they were not kept.
    """

    task: str
    origin: Origin
    tokens: int
    data: tuple[DataEntry, ...]
    first_E: Tensor
    order_E: Tensor
    permutations: Tensor
    chosen: tuple[int, ...]
    further: Tensor | None = None

    @property
    def orders(self) -> Tensor:
        """Experts of every layer by rank, best first, [L, E]."""
        return torch.cat([self.order_E[None], self.permutations[:, self.order_E]])

    @property
    def never_routed(self) -> dict[int, list[int]]:
        """Decoder layer -> experts that no token chose, ascending."""
        rows = zip(self.origin.layers, self.orders, self.chosen, strict=True)
        return {layer: sorted(order_E[count:].tolist()) for layer, order_E, count in rows}

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
                f"the expert set {self.task!r} holds scores of {1 + known} layer(s), not of {layers}",
                hint="compare fewer layers, or make the expert set with further scores kept",
            )
        return torch.cat([self.first_E[None], self.further[: layers - 1]])


def make_expert_set(
    task: str,
    scores: Mapping[int, Tensor],
    *,
    tokens: int,
    never_routed: Mapping[int, Collection[int]] | None = None,
    data: Sequence[DataEntry] = (),
    fingerprint: str = "",
    method: str = "",
    knobs: Mapping[str, Any] | None = None,
    keep_further: bool = True,
) -> ExpertSet:
    """An expert set from the scores of all layers.

    Args:
        task: its name.
        scores: decoder layer -> [E].
        tokens: how many the scores are means over.
        never_routed: decoder layer -> experts that no token chose; they rank behind all others. Of equal scores the
            lower number ranks first.
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
        raise BadData("there are no layers to make an expert set of")
    layers = sorted(scores)
    first = layers[0]
    for layer in layers:
        if scores[layer].shape != scores[first].shape:
            raise UnsupportedModel(
                f"{len(scores[layer])} experts here, but {len(scores[first])} in layer {first}",
                layer=layer,
                hint="an expert set carries ranks over: make it of the model before layers are pruned unevenly",
            )
        if not bool(scores[layer].isfinite().all()):
            expert = int((~scores[layer].isfinite()).nonzero()[0])
            raise NumericFault("the score is not finite", layer=layer, expert=expert)
    table = torch.stack([scores[layer].detach().double().cpu() for layer in layers])
    unseen = [set((never_routed or {}).get(layer, ())) for layer in layers]
    ranks = [_ranked(scores_E, missed) for scores_E, missed in zip(table, unseen, strict=True)]
    permutations = torch.empty(len(layers) - 1, table.shape[1], dtype=torch.int64)
    for row, order_E in zip(permutations, ranks[1:], strict=True):
        row[ranks[0]] = order_E
    experts = table.shape[1]
    origin = Origin(
        fingerprint=fingerprint, method=method, knobs=dict(knobs or {}), layers=tuple(layers), experts=experts
    )
    # Where no token chose any expert, none is behind another.
    chosen = tuple(experts - len(missed) or experts for missed in unseen)
    further = table[1:] if keep_further else None
    return ExpertSet(task, origin, tokens, tuple(data), table[0], ranks[0], permutations, chosen, further)


def _ranked(scores_E: Tensor, unseen: Collection[int]) -> Tensor:
    """Experts by falling score, [E] int64, those unseen last; of equal ones the lower number first."""
    lowered_E = scores_E.clone()
    if len(unseen) < len(scores_E):
        lowered_E[sorted(unseen)] = float("-inf")
    return lowered_E.sort(descending=True, stable=True).indices


def keep_sets(
    expert_set: ExpertSet, keep: int, *, protected: Mapping[int, Collection[int]] | None = None
) -> dict[int, list[int]]:
    """Which experts of each layer to load for a task: decoder layer -> ascending experts.

    For every budget an expert that no token of the task chose is kept only where all that were chosen are, unless it is
    protected.

    Args:
        expert_set: of the task.
        keep: M, experts of each layer.
        protected: decoder layer -> experts that stay whatever their score; they count towards M.

    Raises:
        BadConfig: M outside 1..E, or protected experts that do not exist or are more than stay.
    """
    experts = expert_set.origin.experts
    if not 1 <= keep <= experts:
        raise BadConfig(f"{keep} experts of {experts}", hint=f"keep 1 to {experts} a layer")
    sets = {}
    for layer, order in zip(expert_set.origin.layers, expert_set.orders.tolist(), strict=True):
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


def generalist(expert_sets: Sequence[ExpertSet], task: str = GENERALIST) -> ExpertSet:
    """One expert set of several tasks: sums over tokens added, then divided by all tokens (not a union of top sets).

    Never routed is what no task's text chose.

    For scores that are means over all tokens, as PreMoe's. An adaptive threshold stays each task's own; to have one for
    all, merge the traces instead.

    Raises:
        BadData: no expert sets, of different models or methods, without tokens, or without further scores.
    """
    if not expert_sets:
        raise BadData("there are no expert sets to pool", hint="give at least one")
    origin = expert_sets[0].origin
    for expert_set in expert_sets:
        check_same(origin, expert_set.origin)
    tokens = sum(expert_set.tokens for expert_set in expert_sets)
    if not tokens:
        raise BadData("the expert sets to pool are of no tokens", hint="record some text of each task")
    pooled = sum((p.scores(len(origin.layers)) * p.tokens for p in expert_sets), torch.zeros(())) / tokens
    missed = [expert_set.never_routed for expert_set in expert_sets]
    return make_expert_set(
        task,
        dict(zip(origin.layers, pooled, strict=True)),
        tokens=tokens,
        never_routed={layer: set.intersection(*(set(m[layer]) for m in missed)) for layer in origin.layers},
        data=[entry for expert_set in expert_sets for entry in expert_set.data],
        fingerprint=origin.fingerprint,
        method=origin.method,
        knobs=origin.knobs,
    )


def check_same(first: Origin, second: Origin, file: Path | None = None) -> None:
    """Refuse expert sets that cannot be compared.

    Raises:
        BadData: they are of different models, methods, settings or layers.
    """
    for name in Origin.model_fields:
        left, right = getattr(first, name), getattr(second, name)
        if left != right:
            raise BadData(
                f"expert sets with {name} {left!r} and {right!r} cannot be compared",
                file=file,
                hint="keep expert sets of each model and method in a folder of their own",
            )
