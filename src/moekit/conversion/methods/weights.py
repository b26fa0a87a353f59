"""Split by weights: neurons that look for similar inputs go together.

Shapes: F dense width, H hidden, E experts, I expert width, R neurons that are routed.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moekit.catalogue import register
from moekit.conversion.kmeans import balanced_kmeans
from moekit.conversion.maths import DenseFFN
from moekit.conversion.split import SPLIT_LIMITS, SplitConversion, groups_of, set_apart


@register(
    name="weights",
    kind="convert",
    paper="arXiv:2406.16554",
    changes="weights",
    limits=SPLIT_LIMITS,
    traits=("stochastic",),
)
class WeightSplit(SplitConversion):
    """Balanced k-means of the gate_proj rows, each scaled to length 1 (LLaMA-MoE's "independent clustering").

    Looks at no text, except for a fitted router. The shared expert takes the neurons with the largest product of
    weight norms. Choose it where no text of the model's kind is at hand; the split by activation is better.
    """

    def choose_neurons(
        self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cluster the rows."""
        norm_F = ffn.gate_FH.norm(dim=1) * ffn.up_FH.norm(dim=1) * ffn.down_HF.norm(dim=0)
        shared_S, routed_R = set_apart(norm_F.cpu(), self.shared)
        owner_R, _ = balanced_kmeans(F.normalize(ffn.gate_FH[routed_R], dim=1), self.experts, generator)
        return shared_S, routed_R[groups_of(owner_R, self.experts)]
