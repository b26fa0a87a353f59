"""Second moments of each expert's inputs: what quantizers and whitened decompositions need.

A trace that carries them is large: E (H^2 + I^2) numbers a layer. Layer by layer, one expert's at a time without ever
storing them: `moekit.trace.expert_inputs.ExpertInputs`.

Legend: n tokens of one expert, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from torch import Tensor

from moekit.trace.batch import ExpertBatch
from moekit.trace.vocabulary import expert_statistic


@expert_statistic(shape="EHH", sources=("inputs",))
def input_moment(seen: ExpertBatch) -> Tensor:
    """Sum of x x^T over the expert's inputs (GPTQ's Hessian of gate and up projection, less its factor)."""
    return seen.hidden_nH.T @ seen.hidden_nH


@expert_statistic(shape="EII", sources=("inner",))
def inner_moment(seen: ExpertBatch) -> Tensor:
    """Sum of h h^T over the inputs of the expert's down projection."""
    return seen.inner_nI.T @ seen.inner_nI


@expert_statistic(shape="EII", sources=("weights", "inner"))
def gated_inner_moment(seen: ExpertBatch) -> Tensor:
    """Sum of g^2 h h^T over the inputs of the expert's down projection, g the gate weight: what errors there cost."""
    gated_nI = seen.weights_n[:, None].to(seen.inner_nI.dtype) * seen.inner_nI
    return gated_nI.T @ gated_nI
