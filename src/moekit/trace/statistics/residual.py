"""What the routed experts do to the residual stream.

Legend: N tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moekit.trace.batch import TokenBatch, accumulate
from moekit.trace.vocabulary import statistic


@statistic(shape="", sources=("residual",))
def residual_change(seen: TokenBatch) -> Tensor:
    """Sum over tokens of w = max(1 - cos(h, h + routed output), 0), h the residual stream before the block."""
    return accumulate(seen.change_N)


@statistic(shape="", sources=("residual",), rule="max")
def residual_max(seen: TokenBatch) -> Tensor:
    """Largest absolute value of the residual stream before the block."""
    assert seen.residual is not None
    return seen.residual.abs().amax().float()


@statistic(shape="E", sources=("weights", "outputs", "residual"))
def residual_change_weighted_output_norm(seen: TokenBatch) -> Tensor:
    """Sum of w g n over the expert's tokens, w as in `residual_change` (EASY-EP's importance, arXiv:2504.06792)."""
    return seen.per_expert(seen.change_N[:, None] * seen.weights_NK * seen.output_norm_NK)
