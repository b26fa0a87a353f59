"""Narrower experts: which neurons stay.

A neuron k of an expert adds h_k W_down[:, k] to the output, h the input of the down projection: so leaving it out
changes the output by sqrt(mean h_k^2) ||W_down[:, k]|| in the root mean square over the expert's tokens. That is the
score, by a forward pass alone. Another one is a function of the same signature.

Legend: E experts, M experts that stay, I expert width, W neurons that stay, H hidden, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, NumericFault

# (what is known of the layer as it was, old numbers of the experts, their weights now) -> what each neuron is worth
NeuronScore = Callable[[LayerInputs, Sequence[int], LayerWeights], Tensor]
# Statistics that `contribution` reads.
NEEDS = ("load", "inner_square")


def contribution(inputs: LayerInputs, stands_on: Sequence[int], weights: LayerWeights) -> Tensor:
    """Root mean square of what each neuron adds to its expert's output, [M, I] fp64; 0 where no token came.

    Args:
        inputs: of the layer as it was.
        stands_on: the old expert that each one stands on, whose neurons it has, in their order.
        weights: of the experts as they are now.
    """
    index = torch.tensor(list(stands_on), dtype=torch.int64)
    square_MI = inputs.finite("inner_square").double().cpu()[index]
    load_M = inputs.statistics["load"].double().cpu()[index]
    mean_MI: Tensor = square_MI / load_M.clamp_min(1)[:, None]
    norm_MI: Tensor = torch.linalg.vector_norm(weights.down_EHI.double(), dim=1).cpu()
    score_MI: Tensor = mean_MI.sqrt() * norm_MI
    return score_MI


def widest_neurons(score_MI: Tensor, width: int) -> Tensor:
    """The neurons of the largest scores of each expert, [M, W] ascending; of equal ones the lower number stays.

    Raises:
        BadConfig: more neurons than there are.
        NumericFault: a score is NaN or infinite.
    """
    if not 1 <= width <= score_MI.shape[1]:
        raise BadConfig(f"experts of {score_MI.shape[1]} neurons cannot become {width} wide")
    if not bool(score_MI.isfinite().all()):
        expert = int((~score_MI.isfinite()).any(1).nonzero()[0])
        raise NumericFault("a neuron's score is NaN or infinite", expert=expert, hint="see `moekit check`")
    order_MI = score_MI.sort(dim=1, descending=True, stable=True).indices
    return order_MI[:, :width].sort(dim=1).values
