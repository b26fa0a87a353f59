"""Nested planes: bits of which every prefix is a coarser version of the same weights.

Legend: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, Self

from pydantic import Field, field_validator
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.budget.bits import BitBudget
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import Part, Widths
from moekit.compress.engine.quantizing import Matrices, QuantizeMethod
from moekit.compress.maths.nested import nest
from moekit.errors import BadConfig


@register(
    name="nested",
    kind="quantize",
    paper="arXiv:2504.15299",
    changes="weights",
    limits=(
        "A plane of signs costs a little more error than a grid of its own at the same bits: that is the price of one "
        "file for all widths.",
        "Errors are not fed back to other columns; no calibration text is used.",
        "The folder holds what the asked bits give, in the source's dtype; no engine packs planes, and export refuses "
        "them.",
    ),
)
class NestedPlanes(QuantizeMethod):
    """Round each weight to a plain grid of `base` bits and add planes of one bit, each the sign of what is left.

    W_k = W_(k-1) + s_k sign(W - W_(k-1)), s_k = mean |W - W_(k-1)| of each group, so that W_2 is a part of W_3 and W_3
    of W_4. Choose it to learn what a model loses when its experts are read at several widths out of one set of planes;
    `moekit.compress.maths.nested` makes and packs the planes themselves.
    """

    base: int = Field(default=2, ge=1, le=8, description="bits of the first plane; each further bit is a plane")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[Self]:
        """Groups that divide, and whole rows; planes have no symmetric grids."""
        return [cls(group=gcd(geometry.hidden, geometry.width), base=1), cls(group=0)]

    @field_validator("symmetric")
    @classmethod
    def _no_symmetric_grid(cls, symmetric: bool) -> bool:
        if symmetric:
            raise ValueError("planes lie on no symmetric grid: use rtn or gptq for engines")
        return symmetric

    def allocate(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], budget: BitBudget, sizes: Any
    ) -> dict[int, Widths]:
        """As every method that rounds.

        Raises:
            BadConfig: an expert gets fewer bits than the first plane has.
        """
        found = super().allocate(inputs, scores, budget, sizes)
        for layer, parts in found.items():
            for expert, bits in ((e, n) for widths in parts.values() for e, n in enumerate(widths) if n < self.base):
                raise BadConfig(
                    f"{bits} bits are fewer than the {self.base} of the first plane",
                    layer=layer,
                    expert=expert,
                    hint=f"--set base={bits}, or more bits",
                )
        return found

    def rounded(
        self, matrices: Mapping[Part, Tensor], bits: Mapping[Part, int], expert: int, inputs: LayerInputs
    ) -> Matrices:
        """Each matrix on its own."""
        return {
            part: matrix_RC.clone()
            if bits[part] >= 16
            else nest(matrix_RC, min(self.base, bits[part]), bits[part], self.group).weights().to(matrix_RC.dtype)
            for part, matrix_RC in matrices.items()
        }
