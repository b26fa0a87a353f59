"""The router z-loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moekit.catalogue import register
from moekit.training.collector import Routed
from moekit.training.layers import TrainedLayer
from moekit.training.losses import token_sum
from moekit.training.objectives.base import KIND, RouterObjective, Sums


@register(name="z", kind=KIND, paper="arXiv:2202.08906", changes="weights", axis="gating")
class RouterZ(RouterObjective):
    """Router z-loss of each layer: the mean over tokens of logsumexp(logits)^2 (ST-MoE, eq. 5); keeps logits small.

    Large logits make the choice unstable in low precision; a weight of 0.001 costs no quality.
    """

    def sums(self, routed: Routed) -> Sums:
        """Squares of each token's logsumexp, and tokens."""
        return {
            "squares": token_sum(routed.logits_TE.float().logsumexp(dim=-1).square(), routed.mask_T),
            "tokens": routed.tokens,
        }

    def value(self, sums: Mapping[str, Tensor], layer: TrainedLayer) -> Tensor:
        """Mean over tokens."""
        return sums["squares"] / sums["tokens"].clamp(min=1)
