"""Wanda: weights times the norms of their inputs (ICLR 2024, arXiv:2306.11695), for each expert on its own tokens.

Legend: E experts, H hidden, I expert width, R rows (outputs) and C columns (inputs) of a matrix, n tokens of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import Part
from moekit.compress.engine.zeroing import SparsifyMethod, sparsity_of, valid_pattern
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


@register(
    name="wanda",
    kind="sparsify",
    paper="arXiv:2306.11695",
    needs=("load", "input_square", "inner_square"),
    changes="weights",
    limits=(
        "Zeros are stored: neither the file nor the computation shrinks without a kernel for the pattern (2:4).",
        "Experts that no calibration token chose are sparsified by magnitude.",
    ),
)
class Wanda(SparsifyMethod):
    """Zero the weights that matter least for their output on the calibration text; nothing is trained.

    S_ij = |W_ij| ||X_j||, X_j the values of input channel j over the tokens that this expert saw (of the down
    projection: act(gate x) * up x). In each output row the floor(s C) smallest of C become zero, or n of each m
    consecutive inputs (pattern n:m); of equal scores the higher column stays. `gated` weighs each token with its gate
    weight (MoE-Pruner, arXiv:2410.12013), so that the tokens in which the expert counts decide. Choose it for up to
    half of the weights; beyond, prune some experts first.
    """

    pattern: Annotated[str, AfterValidator(valid_pattern)] = Field(
        default=UNSTRUCTURED, description='"unstructured", or n:m for n zeros in each m consecutive inputs, as in 2:4'
    )
    gated: bool = Field(default=False, description="weigh tokens with their gate weights (MoE-Pruner)")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[SparsifyMethod]:
        """Unstructured, both patterns that kernels know, and weighed by gates."""
        return [cls(), cls(pattern="2:4"), cls(pattern="4:8"), cls(gated=True)]

    @property
    def required(self) -> tuple[str, ...]:
        """Load and squared inputs of all matrices, gated or not."""
        return statistics_of(self.gated)

    @property
    def fixed_sparsity(self) -> float | None:
        """The pattern's share."""
        return sparsity_of(self.pattern)

    def zeroed(self, matrix_RC: Tensor, part: Part, expert: int, inputs: LayerInputs, sparsity: float) -> Tensor:
        """Where |W_ij| ||X_j|| is smallest in its row (|W_ij| where the expert saw no token)."""
        scores_RC = matrix_RC.float().abs()
        norms_C = input_norms(inputs, part, expert, gated=self.gated)
        if norms_C is not None and bool((largest := norms_C.max()) > 0):
            # A factor of the row changes nothing; this one makes equal norms exactly 1, so that no score is rounded.
            scores_RC *= (norms_C / largest).to(scores_RC.device)
        return smallest(scores_RC, sparsity, self.pattern)

    def figures(self, inputs: LayerInputs) -> dict[str, float | list[float]]:
        """Experts that were sparsified by magnitude, since no token chose them."""
        return {"by_magnitude": [float(expert) for expert in inputs.statistics.never_routed]}
