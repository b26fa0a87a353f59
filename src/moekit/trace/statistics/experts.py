"""What single experts see and give.

g is the gate weight that multiplies an expert's output, n = ||f(x)|| the norm of its output before gating. Scores of
the pruning literature follow by division: EAN = output_norm, MAN = output_norm / load, REAP = gated_output_norm / load
(arXiv:2510.13999).

Legend: N tokens, n tokens of one expert, K choices a token, E experts, H hidden, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.batch import ExpertBatch, TokenBatch, accumulate, widest
from moekit.trace.vocabulary import expert_statistic, statistic


@statistic(shape="EH", sources=("inputs",))
def input_sum(seen: TokenBatch) -> Tensor:
    """Sum of the expert's inputs, by channel."""
    return seen.given_NE.T.to(seen.hidden_NH.dtype) @ seen.hidden_NH


@statistic(shape="EH", sources=("inputs",))
def input_square(seen: TokenBatch) -> Tensor:
    """Sum of the expert's squared inputs, by channel (Wanda's norms are its roots, arXiv:2306.11695)."""
    return seen.given_NE.T.to(seen.hidden_NH.dtype).square() @ seen.hidden_NH.square()


@statistic(shape="E", sources=("inputs",))
def input_norm(seen: TokenBatch) -> Tensor:
    """Sum of the norms of the expert's inputs."""
    return accumulate(seen.given_NE * torch.linalg.vector_norm(seen.hidden_NH, dim=-1, keepdim=True), 0)


@statistic(shape="E", sources=("outputs",))
def output_norm(seen: TokenBatch) -> Tensor:
    """Sum of n over the expert's tokens."""
    return seen.per_expert(seen.output_norm_NK)


@statistic(shape="E", sources=("outputs",))
def output_square(seen: TokenBatch) -> Tensor:
    """Sum of n^2 over the expert's tokens."""
    return seen.per_expert(seen.output_norm_NK.square())


@statistic(shape="E", sources=("weights", "outputs"))
def gated_output_norm(seen: TokenBatch) -> Tensor:
    """Sum of g n over the expert's tokens."""
    return seen.per_expert(seen.weights_NK * seen.output_norm_NK)


@statistic(shape="E", sources=("weights", "outputs"))
def gated_output_square(seen: TokenBatch) -> Tensor:
    """Sum of (g n)^2 over the expert's tokens."""
    return seen.per_expert((seen.weights_NK * seen.output_norm_NK).square())


@expert_statistic(shape="EH", sources=("outputs",))
def output_sum(seen: ExpertBatch) -> Tensor:
    """Sum of the expert's outputs before gating, by channel."""
    return seen.outputs_nH.sum(0, dtype=widest(seen.outputs_nH.device))


@expert_statistic(shape="EI", sources=("inner",))
def inner_size(seen: ExpertBatch) -> Tensor:
    """Sum of the absolute inputs of the expert's down projection, by neuron."""
    return seen.inner_nI.abs().sum(0)


@expert_statistic(shape="EI", sources=("inner",))
def inner_square(seen: ExpertBatch) -> Tensor:
    """Sum of the squared inputs of the expert's down projection, by neuron (Wanda's norms are its roots)."""
    return seen.inner_nI.square().sum(0)


@statistic(shape="EV", sources=("outputs",), rule="peak")
def output_peak(seen: TokenBatch) -> Tensor:
    """Largest absolute output before gating: value, channel, position in the sequence (arXiv:2507.23279).

    An expert that was never chosen has value 0 and -1 for channel and position.
    """
    value_NK, channel_NK = seen.output_peak_NK
    by_expert_NE = seen.spread(value_NK)
    value_E, token_E = by_expert_NE.max(dim=0)
    channel_E = seen.spread(channel_NK).gather(0, token_E[None]).squeeze(0)
    peak_EV = torch.stack([value_E, channel_E.to(value_E), seen.position_N[token_E].to(value_E)], dim=1)
    unseen_E = seen.chosen_NE.sum(0) == 0
    peak_EV[:, 1:] = peak_EV[:, 1:].masked_fill(unseen_E[:, None], -1.0)
    return peak_EV
