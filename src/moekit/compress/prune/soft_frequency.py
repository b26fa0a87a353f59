"""Soft frequency: an expert is worth its router scores, chosen or not.

Legend: E experts.
"""

from __future__ import annotations

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs


@register(
    name="soft-frequency",
    kind="prune",
    paper="arXiv:2404.05089",
    # No load: an expert that is never chosen, but nearly, may be worth more than one that is chosen once.
    needs=("soft_frequency",),
    changes="weights",
    limits=("Counts scores of experts that the token never reached; see gate-mass for the routed tokens alone.",),
)
class SoftFrequency(PruneMethod):
    """Keep the experts with the largest sum of router scores over all tokens (soft counting of SEER-MoE).

    S_j = sum over all tokens of p_j, p the softmax (or sigmoid) of the router's logits over all experts, before any
    top-k. Choose it where the calibration text is short, since every token says something about every expert. It is
    not the sum of gate weights over routed tokens, which some papers call by the same name: that is gate-mass.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Sum of router scores of each expert, [E]."""
        return inputs.statistics["soft_frequency"].double()
