"""Magnitude pruning of single weights, the baseline of all others.

Legend: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import Part
from moekit.compress.engine.zeroing import SparsifyMethod, sparsity_of, valid_pattern
from moekit.compress.maths.masks import UNSTRUCTURED, smallest


@register(
    name="magnitude",
    kind="sparsify",
    paper="arXiv:1506.02626",
    changes="weights",
    limits=(
        "Blind to activations: language models lose far more by it than by Wanda from about half the weights on.",
        "Zeros are stored: neither the file nor the computation shrinks without a kernel for the pattern.",
    ),
)
class Magnitude(SparsifyMethod):
    """Zero the weights of smallest absolute value.

    Of each matrix of N weights the floor(s N) with the smallest |W_ij| become zero ("matrix"), or floor(s C) of each
    output row of C weights ("row"), or n of each m consecutive inputs (pattern n:m). Choose it where there is no
    calibration text, and as the baseline that others must beat.
    """

    per: Literal["matrix", "row"] = Field(default="matrix", description="compare weights of a matrix, or of a row")
    pattern: Annotated[str, AfterValidator(valid_pattern)] = Field(
        default=UNSTRUCTURED, description='"unstructured", or n:m for n zeros in each m consecutive inputs'
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[SparsifyMethod]:
        """Both comparisons and a pattern."""
        return [cls(), cls(per="row"), cls(pattern="2:4")]

    @property
    def fixed_sparsity(self) -> float | None:
        """The pattern's share."""
        return sparsity_of(self.pattern)

    def zeroed(self, matrix_RC: Tensor, part: Part, expert: int, inputs: LayerInputs, sparsity: float) -> Tensor:
        """Where |W| is smallest."""
        return smallest(matrix_RC.float().abs(), sparsity, self.pattern, self.per)
