"""What a pruning method is.

A method is a frozen pydantic config with pure functions: `score` turns a layer's statistics into one number an expert,
`decide` turns scores into what is kept, and, for methods that change what stays, `transform` makes the new weights. It
is registered with `@register(kind="prune", needs=...)`; reading, streaming, budgets, writing and proving are not its
business.

Legend: E experts, M experts kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit import catalogue
from moekit.anatomy.probe import Geometry
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerDecision
from moekit.compress.engine.weights import LayerWeights
from moekit.errors import NumericFault


class Reconstruction(Protocol):
    """Runs a layer's MoE block on the calibration inputs with only some of its experts."""

    def loss(self, kept: Sequence[int]) -> float:
        """Distance of the block's output from the full one: sum over batches of the Frobenius norm, in float64."""


class PruneMethod(BaseModel, ABC):
    """Base of all pruning methods; fields are the method's knobs.

    Attributes:
        reads_weights: `score` or `decide` look at `inputs.weights`.
        rewrites: `transform` changes the weights of experts that stay.
        searches: `search` is asked instead of `score` and `decide`; it needs the model, not only statistics.
        sequential: layers are decided one after the other, each on what the pruned layers before it give.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reads_weights: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """Whether each layer is decided on what the pruned layers before it give."""
        return False

    @property
    def required(self) -> tuple[str, ...]:
        """Statistics the method needs with these knobs; those of its record by default."""
        return catalogue.of(type(self)).needs

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """Settings that the generic tests try; the defaults, unless fields are required."""
        return [cls()]

    @abstractmethod
    def score(self, inputs: LayerInputs) -> Tensor:
        """How much each expert is worth, [E]; more is better. Never NaN: a mean over no tokens is 0."""

    def decide(self, inputs: LayerInputs, scores_E: Tensor, keep: int) -> LayerDecision:
        """Which experts stay: by default those with the largest scores."""
        return LayerDecision(keep=keep_highest(scores_E, keep, inputs))

    def transform(self, weights: LayerWeights, decision: LayerDecision, inputs: LayerInputs) -> LayerWeights:
        """Weights of the kept experts and their router rows, in the order of `decision.keep`."""
        return weights.select(decision.keep)

    def search(self, inputs: LayerInputs, block: Reconstruction, keep: int) -> LayerDecision:
        """Decide by trying; for methods with `searches`."""
        raise NotImplementedError(f"{type(self).__name__} does not search")

    def allocate(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], total: int, least: int, most: int
    ) -> dict[int, int]:
        """Share a number of experts among the layers: by default the largest scores anywhere stay.

        Scores are first divided by their layer's sum, since the scales of layers differ.

        Args:
            inputs: of each layer.
            scores: of each layer, [E].
            total: experts kept in all layers together.
            least: fewest a layer keeps.
            most: most a layer keeps (and never more than it has).
        """
        return share_by_score({layer: ranking(s, inputs[layer]) for layer, s in scores.items()}, total, least, most)


def ratio(sum_E: Tensor, count_E: Tensor) -> Tensor:
    """Sum over count in fp64, 0 where nothing was counted."""
    sum_E, count_E = sum_E.double(), count_E.double()
    return torch.where(count_E > 0, sum_E / count_E.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def ranking(scores_E: Tensor, inputs: LayerInputs) -> Tensor:
    """Scores as they are ranked, [E] fp64: protected experts above all, experts that no token chose below all.

    Raises:
        NumericFault: a score is NaN or infinite; names layer and expert.
    """
    ranked_E = scores_E.detach().double().cpu().clone()
    if not bool(ranked_E.isfinite().all()):
        expert = int((~ranked_E.isfinite()).nonzero()[0])
        raise NumericFault(
            f"the score is {float(ranked_E[expert])}",
            layer=inputs.layer,
            expert=expert,
            hint="the expert's weights are damaged (see `moekit check`); such an expert is neither kept nor dropped in "
            "silence",
        )
    unseen = inputs.statistics.never_routed
    if unseen and len(unseen) < len(ranked_E):
        ranked_E[unseen] = float("-inf")
    if inputs.protected:
        ranked_E[sorted(inputs.protected)] = float("inf")
    return ranked_E


def keep_highest(scores_E: Tensor, keep: int, inputs: LayerInputs) -> tuple[int, ...]:
    """The `keep` experts of the largest scores, ascending; of equal scores the higher number goes first.

    Experts that no token chose rank below all others, protected ones above all others.
    """
    order = ranking(scores_E, inputs).sort(descending=True, stable=True).indices
    return tuple(sorted(order[:keep].tolist()))


def share_by_score(ranked: Mapping[int, Tensor], total: int, least: int, most: int) -> dict[int, int]:
    """Counts by which the largest scores anywhere stay, each layer's scores divided by their sum.

    Args:
        ranked: layer -> what `ranking` gave.
        total: experts kept in all.
        least: fewest a layer keeps.
        most: most a layer keeps.
    """
    counts = {layer: min(least, len(r)) for layer, r in ranked.items()}
    offers: list[tuple[float, int]] = []
    for layer, ranked_E in ranked.items():
        finite = ranked_E.isfinite()
        sum_ = float(ranked_E[finite].clamp_min(0).sum()) or 1.0
        ordered = torch.where(finite, ranked_E / sum_, ranked_E).sort(descending=True).values.tolist()
        offers += [(value, layer) for value in ordered[counts[layer] : most]]
    offers.sort(key=lambda offer: (-offer[0], offer[1]))
    for _, layer in offers[: max(0, total - sum(counts.values()))]:
        counts[layer] += 1
    return counts
