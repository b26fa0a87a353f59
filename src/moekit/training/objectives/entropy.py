"""How sure the gate is of each token.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.training.collector import Routed
from moekit.training.layers import TrainedLayer
from moekit.training.losses import token_entropy, token_sum
from moekit.training.objectives.base import KIND, RouterObjective, Sums


@register(name="entropy", kind=KIND, changes="weights", axis="gating")
class Entropy(RouterObjective):
    """Mean entropy of the gate's probabilities: minimised it makes routing decided, with `sign: -1` undecided.

    Per token -sum_e p_e ln p_e in nats, between 0 and ln E; as in COMET (arXiv:2306.02824) and dynamic top-p routing
    (arXiv:2403.07652, eq. 7), which push towards few experts a token.
    """

    sign: Literal[1, -1] = Field(default=1, description="1 makes routing decided, -1 undecided")

    def sums(self, routed: Routed) -> Sums:
        """Entropies, and tokens."""
        return {
            "entropy": token_sum(token_entropy(routed.probabilities_TE), routed.mask_T),
            "tokens": routed.tokens,
        }

    def value(self, sums: Mapping[str, Tensor], layer: TrainedLayer) -> Tensor:
        """Mean over tokens."""
        return self.sign * sums["entropy"] / sums["tokens"].clamp(min=1)
