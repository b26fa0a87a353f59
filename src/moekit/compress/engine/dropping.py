"""What a method is that leaves each layer fewer experts, and how scores of experts are ranked.

`score` turns a layer's statistics into one number an expert, `decide` turns scores into what is kept, and, for methods
that change what stays, `transform` makes the new weights. See `WeightMethod` for what all kinds share.

Legend: E experts, M experts kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekit.catalogue import Trait
from moekit.compress.budget.sizes import (
    Budget,
    ByteSizes,
    bounds,
    check_count,
    check_total,
    total_count,
    uniform_count,
)
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.method import Baseline, Reconstruction, WeightMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import NumericFault

__all__ = ["FewerMethod", "PruneMethod", "Reconstruction", "keep_highest", "ranking", "ratio", "share_by_score"]


class FewerMethod(WeightMethod[Budget, int]):
    """Base of the kinds that leave each layer a number of experts; fields are the method's knobs."""

    @classmethod
    def implied_traits(cls) -> frozenset[Trait]:
        """Narrows, and what all weight methods imply."""
        return super().implied_traits() | {"narrows"}

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """How many of them stay."""
        return f"; they rank below all others, and {len(set(experts) & set(outcome.keep))} of them stay"

    @abstractmethod
    def score(self, inputs: LayerInputs) -> Tensor:
        """How much each expert is worth, [E]; more is better. Never NaN: a mean over no tokens is 0."""

    def worth(self, inputs: LayerInputs) -> Tensor:
        """The scores."""
        return self.score(inputs)

    def allocate(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], budget: Budget, sizes: ByteSizes
    ) -> dict[int, int]:
        """Experts that each layer keeps: equally many, or as `share` says.

        Raises:
            BadConfig: an impossible budget; names the nearest legal value.
        """
        if budget.scope == "uniform":
            return uniform_count(budget, sizes)
        least, most = bounds(budget, sizes)
        total = total_count(budget, sizes)
        check_total(total, least, most, sizes)
        counts = self.share(inputs, scores, total, least, most)
        for layer, count in counts.items():
            check_count(count, sizes.experts[layer], sizes.top_k, layer)
        return counts

    def share(
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


class PruneMethod(FewerMethod):
    """Base of all pruning methods; fields are the method's knobs."""

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """Frequency and random choice."""
        return (Baseline("frequency"), Baseline("random"))

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: int) -> LayerOutcome:
        """Which experts stay: by default those with the largest scores."""
        return LayerOutcome(keep=keep_highest(scores_E, share, inputs))


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
