"""GPTQ: rounding that makes up for its own errors (ICLR 2023, arXiv:2210.17323), for each expert on its own tokens.

Legend: E experts, H hidden, I expert width, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome, Part
from moekit.compress.engine.quantizing import Matrices, QuantizeMethod
from moekit.compress.maths.feedback import inverse_factor, round_with_feedback
from moekit.compress.maths.rounding import round_to_nearest
from moekit.errors import NumericFault
from moekit.trace.batch import widest


@register(
    name="gptq",
    kind="quantize",
    paper="arXiv:2210.17323",
    needs=("load", "input_moment", "inner_moment"),
    changes="weights",
    limits=(
        "Experts that no calibration token chose are rounded to nearest, and named.",
        "Keeps E (H^2 + I^2) numbers a layer in memory and in the plan: for experts of moderate size.",
        "Rounded weights stay in the source's dtype: the folder is as large as before.",
    ),
)
class Gptq(QuantizeMethod):
    """Round column after column, and let the weights not rounded yet make up for what each column lost.

    With H = sum of x x^T over the expert's own tokens, damped by `damp` times the mean of its diagonal, and U the upper
    Cholesky factor of H^-1: e = (w_i - quant(w_i)) / U_ii, w_j -= e U_ij for all j > i. Grids are those of rtn, taken
    when a group's turn comes; layers are measured behind the rounded layers before them. Choose it for 2 to 4 bits.
    """

    keeps_rewritten: ClassVar[bool] = True

    damp: float = Field(default=0.01, gt=0, le=1, description="added to the diagonal, as a share of its mean")

    def rounded(
        self, matrices: Mapping[Part, Tensor], bits: Mapping[Part, int], expert: int, inputs: LayerInputs
    ) -> Matrices:
        """Each matrix by the second moment of its inputs; to nearest where no token chose the expert."""
        outer = self._factor(inputs, "input_moment", expert, matrices) if matrices.keys() & {"gate", "up"} else None
        inner = self._factor(inputs, "inner_moment", expert, matrices) if "down" in matrices else None
        made: Matrices = {}
        for part, matrix_RC in matrices.items():
            upper_CC = inner if part == "down" else outer
            made[part] = (
                round_to_nearest(matrix_RC, bits[part], self.group)
                if upper_CC is None
                else round_with_feedback(matrix_RC, upper_CC, bits[part], self.group)
            )
        return made

    def _factor(self, inputs: LayerInputs, name: str, expert: int, matrices: Mapping[Part, Tensor]) -> Tensor | None:
        """See `inverse_factor`; None where no token chose the expert."""
        if not int(inputs.statistics["load"][expert]):
            return None
        device = next(iter(matrices.values())).device
        moment_CC = inputs.statistics[name][expert].to(device, widest(device))
        if not bool(moment_CC.isfinite().all()):
            raise NumericFault(
                f"the second moments of its inputs ({name}) are not finite",
                layer=inputs.layer,
                expert=expert,
                hint="calibrate in a wider format (--dtype float32 or bfloat16), or see `moekit check`",
            )
        return inverse_factor(moment_CC, self.damp)

    def figures(self, inputs: LayerInputs) -> dict[str, float | list[float]]:
        """Experts that are rounded to nearest, since no token chose them."""
        return {"to_nearest": [float(expert) for expert in inputs.statistics.never_routed]}

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """Which they are."""
        return f": rounded to nearest are {', '.join(map(str, experts))}"
