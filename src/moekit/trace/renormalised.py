"""Statistics over gate weights that are first divided by their token's sum, whatever the family does.

Families differ in whether they renormalise and in their scaling factor; these statistics do not.

Legend: N tokens, K choices a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.observation import Observation
from moekit.trace.vocabulary import statistic


def share_NK(seen: Observation) -> Tensor:
    """Each choice's part in the sum of its token's gate weights, fp32; 0 where that sum is 0."""
    total_N1 = seen.weights_NK.sum(dim=1, keepdim=True)
    return torch.where(total_N1 > 0, seen.weights_NK / total_N1.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


@statistic(shape="E", sources=("weights", "outputs"))
def renormalised_output_norm(seen: Observation) -> Tensor:
    """Sum of (g / sum of the token's g) n over the expert's tokens (REAP's gate since 2026, arXiv:2510.13999)."""
    return seen.per_expert(share_NK(seen) * seen.output_norm_NK)
