"""Wanda: weights times the norms of their inputs (ICLR 2024, arXiv:2306.11695), for each expert on its own tokens.

Legend: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.input_norms import smallest_products, statistics_of, unseen_experts
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import Part
from moekit.compress.engine.zeroing import SparsifyMethod, sparsity_of, valid_pattern
from moekit.compress.maths.masks import UNSTRUCTURED


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
        return smallest_products(matrix_RC, part, expert, inputs, sparsity, self.pattern, gated=self.gated)

    def figures(self, inputs: LayerInputs) -> dict[str, float | list[float]]:
        """Experts that were sparsified by magnitude, since no token chose them."""
        return unseen_experts(inputs)
