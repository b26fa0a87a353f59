"""Sums of products of powers: one family of statistics behind most scores of experts.

With g the gate weight that multiplies an expert's output, n the norm of that output before gating, and w how much the
routed experts turn the token's residual stream, `power(a,b,c)` is the sum of w^a g^b n^c over the expert's tokens:
(0,0,0) is the load, (0,1,0) the gate mass, (0,0,1) EAN, (0,1,1) REAP's sum, (1,1,1) EASY-EP's importance.

Legend: N tokens, K choices a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.observation import Observation
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

    def measure(seen: Observation) -> Tensor:
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
