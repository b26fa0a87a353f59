"""GPTQ: rounding that makes up for its own errors (ICLR 2023, arXiv:2210.17323), for each expert on its own tokens.

Legend: E experts, H hidden, I expert width, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome, Part
from moekit.compress.engine.quantizing import Matrices, QuantizeMethod
from moekit.compress.maths.feedback import round_with_feedback, upper_factor
from moekit.compress.maths.rounding import round_to_nearest
from moekit.errors import NumericFault
from moekit.trace.batch import widest

# Matrices of the same inputs, which share a second moment.
_ALIKE: tuple[tuple[Part, ...], ...] = (("gate", "up"), ("down",))


@register(
    name="gptq",
    kind="quantize",
    paper="arXiv:2210.17323",
    needs=("load",),
    changes="weights",
    limits=(
        "Experts that no calibration token chose are rounded to nearest, and named.",
        "A stored plan is carried out again on the text that it was made on: second moments are kept nowhere.",
        "Rounded weights stay in the source's dtype: the folder is as large as before.",
    ),
)
class Gptq(QuantizeMethod):
    """Round column after column, and let the weights not rounded yet make up for what each column lost.

    With H = sum of x x^T over the expert's own tokens, damped by `damp` times the mean of its diagonal, and U the upper
    Cholesky factor of H^-1: e = (w_i - quant(w_i)) / U_ii, w_j -= e U_ij for all j > i. Grids are those of rtn, taken
    when a group's turn comes; layers are measured behind the rounded layers before them. Choose it for 2 to 4 bits.
    """

    reads_moments: ClassVar[bool] = True

    damp: float = Field(default=0.01, gt=0, le=1, description="added to the diagonal, as a share of its mean")

    def rounded(
        self, matrices: Mapping[Part, Tensor], bits: Mapping[Part, int], expert: int, inputs: LayerInputs
    ) -> Matrices:
        """Each matrix by the second moment of its inputs; to nearest where no token chose the expert."""
        made: Matrices = {}
        moments = inputs.moments(expert) if int(inputs.statistics["load"][expert]) else None
        for among in _ALIKE:
            parts = [part for part in among if part in matrices]
            upper_CC = None
            if parts and moments is not None:
                moment_CC = moments.inner_II if parts == ["down"] else moments.inputs_HH
                upper_CC = self._factor(moment_CC, parts[0], expert, inputs.layer, matrices[parts[0]].device)
            for n in sorted({bits[part] for part in parts}):
                alike = [part for part in parts if bits[part] == n]
                # Rows do not know of each other: matrices of the same inputs are rounded as one.
                rows_RC = torch.cat([matrices[part] for part in alike])
                rounded_RC = (
                    round_to_nearest(rows_RC, n, self.group, self.symmetric)
                    if upper_CC is None
                    else round_with_feedback(rows_RC, upper_CC, n, self.group, self.symmetric)
                )
                made |= zip(alike, torch.split(rounded_RC, [len(matrices[part]) for part in alike]), strict=True)
        return made

    def _factor(self, moment_CC: Tensor, part: Part, expert: int, layer: int, device: torch.device) -> Tensor | None:
        """See `upper_factor`."""
        if not bool(moment_CC.isfinite().all()):
            raise NumericFault(
                f"the second moments of the inputs of the {part} projection are not finite",
                layer=layer,
                expert=expert,
                hint="calibrate in a wider format (--dtype float32 or bfloat16), or see `moekit check`",
            )
        return upper_factor(moment_CC.to(device, widest(device)), self.damp)

    def figures(self, inputs: LayerInputs) -> dict[str, float | list[float]]:
        """Experts that are rounded to nearest, since no token chose them."""
        return {"to_nearest": [float(expert) for expert in inputs.statistics.never_routed]}

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """Which they are."""
        return f": rounded to nearest are {', '.join(map(str, experts))}"
