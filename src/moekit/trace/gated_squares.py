"""Squared inputs of experts, weighed by how much of the expert's output a token takes.

Legend: E experts, H hidden, I expert width, n tokens of one expert.
"""

from __future__ import annotations

from torch import Tensor

from moekit.trace.observation import Segment
from moekit.trace.vocabulary import expert_statistic


@expert_statistic(shape="EH", sources=("weights", "inputs"))
def gated_input_square(seen: Segment) -> Tensor:
    """Sum of the expert's squared inputs times the squared gate weight, by channel (MoE-Pruner, arXiv:2410.12013)."""
    return seen.weights_n.square() @ seen.hidden_nH.square()


@expert_statistic(shape="EI", sources=("weights", "inner"))
def gated_inner_square(seen: Segment) -> Tensor:
    """Sum of the squared inputs of the expert's down projection times the squared gate weight, by neuron."""
    return seen.weights_n.square() @ seen.inner_nI.square()
