"""Scores of single weights by what their inputs are: |W_ij| ||X_j||, for each expert on its own tokens.

What Wanda (arXiv:2306.11695) zeroes by, and OWL (arXiv:2310.05175) counts outliers by.

Legend: E experts, H hidden, I expert width, R rows (outputs) and C columns (inputs) of a matrix, n tokens of an expert.
"""

from __future__ import annotations

from torch import Tensor

from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import Part
from moekit.compress.maths.masks import UNSTRUCTURED, smallest
from moekit.errors import NumericFault
from moekit.trace.batch import ExpertBatch
from moekit.trace.vocabulary import expert_statistic


@expert_statistic(shape="EH", sources=("weights", "inputs"))
def gated_input_square(seen: ExpertBatch) -> Tensor:
    """Sum of the expert's squared inputs times the squared gate weight, by channel (MoE-Pruner, arXiv:2410.12013)."""
    return seen.weights_n.square() @ seen.hidden_nH.square()


@expert_statistic(shape="EI", sources=("weights", "inner"))
def gated_inner_square(seen: ExpertBatch) -> Tensor:
    """Sum of the squared inputs of the expert's down projection times the squared gate weight, by neuron."""
    return seen.weights_n.square() @ seen.inner_nI.square()


def statistics_of(gated: bool) -> tuple[str, str, str]:
    """Statistics behind the norms: load, inputs of gate and up, inputs of down."""
    return ("load", "gated_input_square", "gated_inner_square") if gated else ("load", "input_square", "inner_square")


def input_norms(inputs: LayerInputs, part: Part, expert: int, *, gated: bool = False) -> Tensor | None:
    """Root mean square of each input channel of a matrix over the tokens that its expert saw, [C] fp32.

    Args:
        inputs: of the layer.
        part: "gate" and "up" read the block's input, "down" what gate and up make of it.
        expert: whose matrix.
        gated: each token counts with its gate weight.

    Returns:
        The norms; None for an expert that no token chose.
    """
    load, outer, inner = statistics_of(gated)
    tokens = int(inputs.statistics[load][expert])
    if not tokens:
        return None
    squares_C = inputs.statistics[inner if part == "down" else outer][expert].double()
    if not bool(squares_C.isfinite().all()):
        raise NumericFault(
            f"the inputs of its {part} projection sum up to {float(squares_C[~squares_C.isfinite()][0])}",
            layer=inputs.layer,
            expert=expert,
            hint="calibrate in a wider format (--dtype float32 or bfloat16), or see `moekit check`",
        )
    return (squares_C / tokens).sqrt().float()


def smallest_products(
    matrix_RC: Tensor,
    part: Part,
    expert: int,
    inputs: LayerInputs,
    sparsity: float,
    pattern: str = UNSTRUCTURED,
    *,
    gated: bool = False,
) -> Tensor:
    """Where |W_ij| ||X_j|| is smallest in its row (|W_ij| where the expert saw no token): a mask [R, C].

    Args:
        matrix_RC: finite weights, rows are outputs.
        part: which of the expert's matrices.
        expert: whose.
        inputs: of the layer.
        sparsity: share of zeros.
        pattern: "unstructured", or n:m.
        gated: each token counts with its gate weight.
    """
    scores_RC = matrix_RC.float().abs()
    norms_C = input_norms(inputs, part, expert, gated=gated)
    if norms_C is not None and bool((largest := norms_C.max()) > 0):
        # A factor of the row changes nothing; this one makes equal norms exactly 1, so that no score is rounded.
        scores_RC *= (norms_C / largest).to(scores_RC.device)
    return smallest(scores_RC, sparsity, pattern)


def unseen_experts(inputs: LayerInputs) -> dict[str, float | list[float]]:
    """For a plan's figures: experts that were judged by magnitude, since no token chose them."""
    return {"by_magnitude": [float(expert) for expert in inputs.statistics.never_routed]}
