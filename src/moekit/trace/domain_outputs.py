"""How much each domain's tokens get out of each expert, so that domains can be weighed against each other afterwards.

g is the gate weight that multiplies an expert's output, n the norm of that output before gating, w how much the routed
experts turn the token's residual stream.

Legend: N tokens, K choices a token, E experts, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.observation import Observation, widest
from moekit.trace.vocabulary import statistic


def by_domain(seen: Observation, values_NK: Tensor) -> Tensor:
    """Sum over each domain's tokens of a value of each choice, by expert: [D, E] fp64."""
    wide = widest(values_NK.device)
    sum_DE = torch.zeros(seen.domains, seen.experts, dtype=wide, device=values_NK.device)
    return sum_DE.index_add_(0, seen.domain_N, seen.spread(values_NK).to(wide))


@statistic(shape="DE", sources=("weights", "outputs"))
def domain_gated_output_norm(seen: Observation) -> Tensor:
    """Sum of g n over the expert's tokens of each domain; over all domains it is `gated_output_norm`."""
    return by_domain(seen, seen.weights_NK * seen.output_norm_NK)


@statistic(shape="DE", sources=("weights", "outputs", "residual"))
def domain_turning_output_norm(seen: Observation) -> Tensor:
    """Sum of w g n over the expert's tokens of each domain; over all domains it is `turning_output_norm`."""
    return by_domain(seen, seen.change_N[:, None] * seen.weights_NK * seen.output_norm_NK)
