"""Split by activation: neurons that fire on the same tokens go together.

Shapes: N tokens, F dense width, E experts, I expert width, R neurons that are routed.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn import functional as F

from moekit.catalogue import register
from moekit.conversion.kmeans import balanced_kmeans
from moekit.conversion.maths import DenseFFN, neuron_strengths
from moekit.conversion.split import SPLIT_LIMITS, SplitConversion, groups_of, set_apart


def strongest_markers(strength_NF: torch.Tensor, share: float) -> torch.Tensor:
    """1 where a neuron is among the strongest of a token, else 0; float32 [N, F].

    Args:
        strength_NF: contribution of each neuron to each token.
        share: which share of the neurons of a token is marked.
    """
    count = max(1, round(share * strength_NF.shape[1]))
    top_NC = strength_NF.topk(count, dim=1).indices
    return torch.zeros_like(strength_NF).scatter_(1, top_NC, 1.0)


@register(
    name="activation",
    kind="convert",
    paper="arXiv:2502.04416",
    changes="weights",
    limits=SPLIT_LIMITS,
    traits=("stochastic",),
)
class ActivationSplit(SplitConversion):
    """Balanced k-means of which neurons are strongest on which tokens of calibration text.

    A neuron is marked on a token where |h_j| ||down_j|| is among the largest tenth; neurons with similar marks form an
    expert, and those marked most often the shared expert (after CMoE). The best split before training; choose it by
    default, with calibration text of the kind the model is for.
    """

    marked: float = Field(default=0.1, gt=0, lt=1, description="share of a token's neurons that counts as strong")

    @property
    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def choose_neurons(
        self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cluster the columns of the marker matrix."""
        assert inputs_NH is not None  # `check` has made sure
        marker_NF = strongest_markers(neuron_strengths(ffn, inputs_NH), self.marked)
        shared_S, routed_R = set_apart(marker_NF.mean(0).cpu(), self.shared)
        owner_R, _ = balanced_kmeans(F.normalize(marker_NF.T[routed_R], dim=1), self.experts, generator)
        return shared_S, routed_R[groups_of(owner_R, self.experts)]
