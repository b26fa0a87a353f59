"""Wanda's importance of weights (arXiv:2306.11695), summed up to whole experts.

Legend: E experts, I expert width, H hidden.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.weights import LayerWeights


def mean_importance(weights: LayerWeights, input_norm_EH: Tensor, inner_norm_EI: Tensor) -> Tensor:
    """Mean of |W_ab| times the norm of input b over an expert's matrices: [E] fp64.

    Args:
        weights: of the layer; biases have no input and are left out.
        input_norm_EH: norms of the inputs of gate and up projections, by channel, over the expert's tokens.
        inner_norm_EI: norms of the inputs of its down projection, by neuron.
    """
    importance_E = torch.zeros(weights.experts, dtype=torch.float64)
    reads = [(weights.up_EIH, input_norm_EH), (weights.down_EHI, inner_norm_EI)]
    if weights.gate_EIH is not None:
        reads.append((weights.gate_EIH, input_norm_EH))
    for expert in range(weights.experts):  # one by one: a copy of the whole layer would be large
        total, count = torch.zeros((), dtype=torch.float64), 0
        for matrices, norms in reads:
            column_b = matrices[expert].abs().sum(dim=0, dtype=torch.float32).double().cpu()
            total += column_b @ norms[expert].double().cpu()
            count += matrices[expert].numel()
        importance_E[expert] = total / count
    return importance_E


@register(
    name="wanda-expert",
    kind="prune",
    paper="arXiv:2306.11695",
    needs=("load", "input_square", "inner_square"),
    changes="weights",
    limits=("Our extension of a score for single weights; blind to gates and to what becomes of an output.",),
)
class WandaExpert(PruneMethod):
    """Keep the experts whose weights matter most by Wanda's measure.

    S_j = mean over all weights of the expert's gate, up and down projections of |W_ab| x ||X_b||, X_b the b-th input
    over the tokens routed to it; norms are roots of sums of squares, so frequency counts. Choose it to compare dropping
    whole experts with Wanda's pruning inside them, by one and the same measure.
    """

    reads_weights: ClassVar[bool] = True

    def score(self, inputs: LayerInputs) -> Tensor:
        """Mean importance of each expert's weights, [E]."""
        stats = inputs.statistics
        norms = (stats[name].double().sqrt() for name in ("input_square", "inner_square"))
        return mean_importance(inputs.weights, *norms)
