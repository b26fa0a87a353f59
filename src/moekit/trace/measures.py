"""The statistics moekit knows, each a pure function of an `Observation`.

Sums run over tokens that are no padding. g is the gate weight that multiplies an expert's output, n = ||f(x)|| the norm
of its output before gating. Scores of the pruning literature follow by division: EAN = output_norm, MAN = output_norm /
load, REAP = gated_output_norm / load (arXiv:2510.13999), EASY-EP = turning_output_norm (arXiv:2504.06792).

Legend: N tokens, n tokens of one expert, K choices a token, E experts, H hidden, I expert width, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.observation import Observation, Segment, accumulate, widest
from moekit.trace.vocabulary import expert_statistic, statistic


@statistic(shape="E", integer=True)
def load(seen: Observation) -> Tensor:
    """Tokens that chose the expert."""
    return seen.chosen_NE.sum(0).long()


@statistic(shape="EE", integer=True)
def coactivation(seen: Observation) -> Tensor:
    """Tokens that chose both experts; symmetric, the diagonal is the load (arXiv:2504.01337, section 3.2)."""
    # Products of zeros and ones, summed in fp32: exact up to 2^24 tokens, far more than one observation holds.
    return (seen.chosen_NE.T @ seen.chosen_NE).long()


def _by_domain(seen: Observation, values_NE: Tensor) -> Tensor:
    wide = widest(values_NE.device)
    member_ND = torch.nn.functional.one_hot(seen.domain_N, seen.domains).to(wide)
    return member_ND.T @ values_NE.to(wide)


@statistic(shape="DE", integer=True)
def domain_load(seen: Observation) -> Tensor:
    """Tokens of each domain that chose the expert."""
    return _by_domain(seen, seen.chosen_NE).long()


@statistic(shape="E", sources=("weights",))
def gate_mass(seen: Observation) -> Tensor:
    """Sum of gate weights."""
    return accumulate(seen.gates_NE, 0)


@statistic(shape="E", sources=("weights",))
def gate_square(seen: Observation) -> Tensor:
    """Sum of squared gate weights."""
    return accumulate(seen.gates_NE.square(), 0)


@statistic(shape="E", sources=("weights",), rule="max")
def gate_max(seen: Observation) -> Tensor:
    """Largest gate weight; 0 if never chosen."""
    return seen.gates_NE.amax(0)


@statistic(shape="E", sources=("weights",), integer=True)
def first_load(seen: Observation) -> Tensor:
    """Tokens for which the expert has the largest gate weight; ties go to the earlier choice."""
    first_N = seen.indices_NK.gather(1, seen.weights_NK.argmax(1, keepdim=True)).squeeze(1)
    return torch.bincount(first_N, minlength=seen.experts + 1)[: seen.experts]


@statistic(shape="DE", sources=("weights",))
def domain_gate_mass(seen: Observation) -> Tensor:
    """Sum of gate weights over each domain's tokens."""
    return _by_domain(seen, seen.gates_NE)


@statistic(shape="E", sources=("logits",))
def soft_frequency(seen: Observation) -> Tensor:
    """Sum of router scores over all tokens, chosen or not (soft counting, arXiv:2404.05089)."""
    return accumulate(seen.scores_NE, 0)


def _finite(logits_NE: Tensor) -> Tensor:
    # A router may forbid experts with -inf; such logits count as 0 in moments.
    return logits_NE.masked_fill(logits_NE == float("-inf"), 0.0)


@statistic(shape="E", sources=("logits",))
def logit_sum(seen: Observation) -> Tensor:
    """Sum of router logits over all tokens."""
    return accumulate(_finite(seen.logits_NE), 0)


@statistic(shape="E", sources=("logits",))
def logit_square(seen: Observation) -> Tensor:
    """Sum of squared router logits over all tokens."""
    return accumulate(_finite(seen.logits_NE).square(), 0)


@statistic(shape="EE", sources=("logits",))
def logit_gram(seen: Observation) -> Tensor:
    """Gram matrix of the experts' logits over all tokens; cosines follow (M-SMoE, arXiv:2310.01334)."""
    logits_NE = _finite(seen.logits_NE)
    return logits_NE.T @ logits_NE


@statistic(shape="", sources=("logits",))
def score_entropy(seen: Observation) -> Tensor:
    """Sum over tokens of the entropy of the (normalised) router scores, in nats."""
    share_NE = seen.scores_NE / seen.scores_NE.sum(-1, keepdim=True)
    return accumulate(torch.special.entr(share_NE))


@statistic(shape="EH", sources=("inputs",))
def input_sum(seen: Observation) -> Tensor:
    """Sum of the expert's inputs, by channel."""
    return seen.chosen_NE.T @ seen.hidden_NH


@statistic(shape="EH", sources=("inputs",))
def input_square(seen: Observation) -> Tensor:
    """Sum of the expert's squared inputs, by channel (Wanda's norms are its roots, arXiv:2306.11695)."""
    return seen.chosen_NE.T @ seen.hidden_NH.square()


@statistic(shape="E", sources=("inputs",))
def input_norm(seen: Observation) -> Tensor:
    """Sum of the norms of the expert's inputs."""
    return accumulate(seen.chosen_NE * torch.linalg.vector_norm(seen.hidden_NH, dim=-1, keepdim=True), 0)


@statistic(shape="E", sources=("outputs",))
def output_norm(seen: Observation) -> Tensor:
    """Sum of n over the expert's tokens."""
    return seen.per_expert(seen.output_norm_NK)


@statistic(shape="E", sources=("outputs",))
def output_square(seen: Observation) -> Tensor:
    """Sum of n^2 over the expert's tokens."""
    return seen.per_expert(seen.output_norm_NK.square())


@statistic(shape="E", sources=("weights", "outputs"))
def gated_output_norm(seen: Observation) -> Tensor:
    """Sum of g n over the expert's tokens."""
    return seen.per_expert(seen.weights_NK * seen.output_norm_NK)


@statistic(shape="E", sources=("weights", "outputs"))
def gated_output_square(seen: Observation) -> Tensor:
    """Sum of (g n)^2 over the expert's tokens."""
    return seen.per_expert((seen.weights_NK * seen.output_norm_NK).square())


@expert_statistic(shape="EH", sources=("outputs",))
def output_sum(seen: Segment) -> Tensor:
    """Sum of the expert's outputs before gating, by channel."""
    return seen.outputs_nH.sum(0)


@expert_statistic(shape="EI", sources=("inner",))
def inner_square(seen: Segment) -> Tensor:
    """Sum of the squared inputs of the expert's down projection, by neuron (Wanda's norms are its roots)."""
    return seen.inner_nI.square().sum(0)


@statistic(shape="EV", sources=("outputs",), rule="peak")
def output_peak(seen: Observation) -> Tensor:
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


@statistic(shape="", sources=("residual",))
def residual_change(seen: Observation) -> Tensor:
    """Sum over tokens of w = max(1 - cos(h, h + routed output), 0), h the residual stream before the block."""
    return accumulate(seen.change_N)


@statistic(shape="", sources=("residual",), rule="max")
def residual_max(seen: Observation) -> Tensor:
    """Largest absolute value of the residual stream before the block."""
    assert seen.residual is not None
    return seen.residual.abs().amax().float()


@statistic(shape="E", sources=("weights", "outputs", "residual"))
def turning_output_norm(seen: Observation) -> Tensor:
    """Sum of w g n over the expert's tokens, w as in `residual_change` (EASY-EP's importance, arXiv:2504.06792)."""
    return seen.per_expert(seen.change_N[:, None] * seen.weights_NK * seen.output_norm_NK)
