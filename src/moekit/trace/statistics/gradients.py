"""How the loss depends on neurons, outputs and streams: one backward pass.

The loss is next-token cross-entropy summed over predicted tokens, unless the recording names another one.

Legend: N tokens, n tokens of one expert, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from torch import Tensor

from moekit.trace.batch import ExpertBatch, TokenBatch, accumulate
from moekit.trace.vocabulary import expert_statistic, statistic


@expert_statistic(shape="EI", sources=("gradients",))
def neuron_taylor(seen: ExpertBatch) -> Tensor:
    """Sum over the expert's tokens of h dL/dh, h the input of its down projection: what zeroing a neuron takes away.

    It equals the sum of w dL/dw over a neuron's column of the down projection, or over its row of the up projection.
    """
    return (seen.inner_nI * seen.inner_gradient_nI).sum(0)


@expert_statistic(shape="EI", sources=("gradients",))
def neuron_taylor_size(seen: ExpertBatch) -> Tensor:
    """Sum over the expert's tokens of |h dL/dh|, h the input of its down projection, by neuron.

    At a minimum of the loss the signed sum is near zero for every neuron; sizes do not cancel, token by token.
    """
    return (seen.inner_nI * seen.inner_gradient_nI).abs().sum(0)


@expert_statistic(shape="EI", sources=("gradients",))
def neuron_fisher(seen: ExpertBatch) -> Tensor:
    """Sum over the expert's tokens of (h dL/dh)^2, h the input of its down projection, by neuron."""
    return (seen.inner_nI * seen.inner_gradient_nI).square().sum(0)


@statistic(shape="H", sources=("stream_gradients",))
def stream_gradient_square(seen: TokenBatch) -> Tensor:
    """Sum over tokens of the squared gradient after the decoder layer, by channel."""
    return accumulate(seen.stream_gradient_NH.square(), 0)
