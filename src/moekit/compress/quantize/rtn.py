"""Rounding to nearest, the baseline of all others.

Legend: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import Part
from moekit.compress.engine.quantizing import Matrices, QuantizeMethod
from moekit.compress.maths.rounding import round_to_nearest


@register(
    name="rtn",
    kind="quantize",
    changes="weights",
    limits=(
        "Blind to activations: what an error does to the output is not looked at, which costs most at few bits.",
        "Rounded weights stay in the source's dtype: the folder is as large as before.",
    ),
)
class RoundToNearest(QuantizeMethod):
    """Round each weight to the nearest value of its group's grid, between the smallest and the largest weight.

    W' = s (clamp(round(W / s) + z, 0, 2^b - 1) - z), s = (max - min) / (2^b - 1), z = round(-min / s), of each group of
    consecutive inputs of a row, the range widened to hold 0; at 1 bit W' = sign(W) mean |W|. Choose it where there is
    no calibration text, at 4 bits and above, and as the baseline that others must beat.
    """

    def rounded(
        self, matrices: Mapping[Part, Tensor], bits: Mapping[Part, int], expert: int, inputs: LayerInputs
    ) -> Matrices:
        """Each matrix on its own."""
        return {
            part: round_to_nearest(matrix_RC, bits[part], self.group, self.symmetric)
            for part, matrix_RC in matrices.items()
        }
