"""Mutual information of tokens and experts.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moekit.catalogue import register
from moekit.training.collector import Routed
from moekit.training.layers import TrainedLayer
from moekit.training.losses import token_entropy, token_sum
from moekit.training.objectives.base import KIND, RouterObjective, Sums


@register(name="mi", kind=KIND, paper="arXiv:2306.04640", changes="weights", axis="gating")
class MutualInformation(RouterObjective):
    """Minus the mutual information of token and expert: experts are used alike, and each token is sure of its own.

    Per layer sum_e p(e) ln p(e) + mean_t H(p(e | t)), p(e) the mean gate probability of e (ModuleFormer, section 3.2;
    Mod-Squad, arXiv:2212.08066, eq. 5). Between -ln E, when tokens choose surely and evenly, and 0.
    """

    def sums(self, routed: Routed) -> Sums:
        """Gate probability of each expert, entropies of tokens, and tokens."""
        return {
            "mass_E": token_sum(routed.probabilities_TE, routed.mask_T),
            "entropy": token_sum(token_entropy(routed.probabilities_TE), routed.mask_T),
            "tokens": routed.tokens,
        }

    def value(self, sums: Mapping[str, Tensor], layer: TrainedLayer) -> Tensor:
        """Mean entropy of tokens minus entropy of the mean."""
        tokens = sums["tokens"].clamp(min=1)
        return sums["entropy"] / tokens - token_entropy(sums["mass_E"] / tokens)
