"""Split at random.

Shapes: F dense width, E experts, I expert width.
"""

from __future__ import annotations

import torch

from moekit.catalogue import register
from moekit.conversion.maths import DenseFFN
from moekit.conversion.split import SPLIT_LIMITS, SplitConversion


@register(
    name="random",
    kind="convert",
    paper="arXiv:2406.16554",
    changes="weights",
    limits=SPLIT_LIMITS,
    traits=("stochastic",),
)
class RandomSplit(SplitConversion):
    """Deal the neurons to experts at random (LLaMA-MoE's "independent random").

    By far the worst split before training, and the best after 200 billion tokens of it in the paper. Choose it as the
    baseline that other splits must beat, or for very long training.
    """

    def choose_neurons(
        self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A random permutation, cut."""
        order_F = torch.randperm(ffn.gate_FH.shape[0], generator=generator)
        return order_F[: self.shared], order_F[self.shared :].view(self.experts, -1)
