"""The general family behind scores of one pass: sum of w^a g^b n^c, divided by count^d.

g is the gate weight that multiplies an expert's output, n the norm of that output before gating, w how much the routed
experts turn the token's residual stream: `power(0,0,0)` is the load, `power(0,1,0)` the gate mass, `power(0,1,1)`
REAP's sum.

Legend: N tokens, K choices a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ratio
from moekit.compress.engine.inputs import LayerInputs
from moekit.trace.batch import TokenBatch
from moekit.trace.vocabulary import Source, Statistic, member_name, statistic_family


@statistic_family
def power(token: float, gate: float, norm: float) -> Statistic:
    """Sum of w^token g^gate n^norm over the expert's tokens, [E]; 0^0 is 1.

    A factor of exponent 0 is not looked at, so that it need not be recorded.

    Raises:
        ValueError: a negative exponent; w, g and n may be 0.
    """
    if min(token, gate, norm) < 0:
        raise ValueError("exponents must not be negative")
    readers: tuple[tuple[Source, float], ...] = (("residual", token), ("weights", gate), ("outputs", norm))
    sources = tuple(source for source, exponent in readers if exponent)

    def measure(seen: TokenBatch) -> Tensor:
        product_NK = torch.ones_like(seen.indices_NK, dtype=torch.float32)
        if token:
            product_NK = product_NK * seen.change_N[:, None] ** token
        if gate:
            product_NK = product_NK * seen.weights_NK**gate
        if norm:
            product_NK = product_NK * seen.output_norm_NK**norm
        return seen.per_expert(product_NK)

    doc = f"Sum of w^{token:g} g^{gate:g} n^{norm:g} over the expert's tokens."
    return Statistic(member_name("power", token, gate, norm), "E", sources or ("choices",), "sum", False, doc, measure)


@register(
    name="power",
    kind="prune",
    needs=("load", "power(0,1,1)"),
    changes="weights",
    limits=("Another triple of token, gate and norm needs another pass; another count does not.",),
)
class Power(PruneMethod):
    """Keep the experts with the largest sum of w^token g^gate n^norm over their tokens, divided by load^count.

    g is the gate weight that multiplies the expert's output, n the norm of that output before gating, w = max(1 -
    cos(h, h + y), 0) how much the routed output y turns the token's residual stream h (EASY-EP). Exponents (token,
    gate, norm, count) of known scores: frequency (0,0,0,0), gate-mass (0,1,0,0), ean (0,0,1,0), man (0,0,1,1), msan
    (0,0,2,1), weighted-ean (0,1,1,0), REAP on gates as they are (0,1,1,1), EASY-EP (1,1,1,0). Choose it to search
    between them: a count of 0 rewards busy experts, 1 forgets how often an expert was chosen.
    """

    token: float = Field(default=0.0, ge=0, le=8, description="exponent a of the token's weight w")
    gate: float = Field(default=1.0, ge=0, le=8, description="exponent b of the gate weight g")
    norm: float = Field(default=1.0, ge=0, le=8, description="exponent c of the output norm n")
    count: float = Field(default=1.0, ge=0, le=8, description="exponent d of the load that divides the sum")

    @field_validator("token", "gate", "norm", "count")
    @classmethod
    def _short(cls, value: float) -> float:
        # Exponents stand in the statistic's name, where all their digits must fit.
        if round(value, 3) != value:
            raise ValueError("an exponent has at most three decimals")
        return value

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """REAP's exponents, and EASY-EP's, which read the residual stream."""
        return [cls(), cls(token=1, count=0)]

    @property
    def required(self) -> tuple[str, ...]:
        """Load and the family's member with these exponents."""
        return ("load", member_name("power", self.token, self.gate, self.norm))

    def score(self, inputs: LayerInputs) -> Tensor:
        """The sum over load^count of each expert, [E]; 0 where no token chose it."""
        load, total = (inputs.statistics[name].double() for name in self.required)
        return ratio(total, load**self.count)


PRESETS: dict[str, Power] = {
    "frequency": Power(token=0, gate=0, norm=0, count=0),
    "gate-mass": Power(token=0, gate=1, norm=0, count=0),
    "ean": Power(token=0, gate=0, norm=1, count=0),
    "man": Power(token=0, gate=0, norm=1, count=1),
    "msan": Power(token=0, gate=0, norm=2, count=1),
    "weighted-ean": Power(token=0, gate=1, norm=1, count=0),
    "reap": Power(token=0, gate=1, norm=1, count=1),
    "easy-ep": Power(token=1, gate=1, norm=1, count=0),
}
