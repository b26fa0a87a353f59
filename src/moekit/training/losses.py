"""Balance, z and importance losses of one MoE layer, computed from what its router really chose.

transformers re-derives the choice as the top-k of the logits and pools all layers before it multiplies. Both hide
imbalance: a selection bias, expert groups or a routing policy make the chosen experts differ from the top-k, and two
layers that are unbalanced in opposite ways look balanced when pooled. Here every function takes one layer and the
indices that its router returned; index E means "no expert" and counts nowhere.

Legend: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scores = Literal["softmax", "sigmoid"]


def gate_scores(logits_TE: Tensor, scores: Scores = "softmax") -> Tensor:
    """What a router ranks experts by, before its selection bias: [T, E] fp32."""
    return logits_TE.softmax(dim=-1, dtype=torch.float32) if scores == "softmax" else logits_TE.float().sigmoid()


def probabilities(logits_TE: Tensor, scores: Scores = "softmax") -> Tensor:
    """Gate probabilities that sum to one per token: [T, E] fp32.

    Args:
        logits_TE: router logits.
        scores: "softmax", or "sigmoid" divided by its sum (DeepSeek-V3, arXiv:2412.19437, eq. 19).
    """
    if scores == "softmax":
        return gate_scores(logits_TE)
    scores_TE = gate_scores(logits_TE, scores)
    # The floor keeps the gradient finite where every sigmoid has underflowed.
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def expert_load(indices_TK: Tensor, experts: int, mask_T: Tensor | None = None) -> Tensor:
    """How many choices fell on each expert: [E] int64.

    Args:
        indices_TK: chosen experts; E where a place stayed empty.
        experts: E.
        mask_T: bool, False at padding.
    """
    chosen_TK = indices_TK if mask_T is None else indices_TK.masked_fill(~mask_T.unsqueeze(-1), experts)
    # Not bincount: it waits for a GPU and has no deterministic kernel there.
    load_E = torch.zeros(experts + 1, dtype=torch.int64, device=indices_TK.device)
    flat = chosen_TK.reshape(-1)
    return load_E.scatter_add_(0, flat, torch.ones_like(flat))[:experts]


def token_entropy(probabilities_TE: Tensor) -> Tensor:
    """Entropy of each token's gate probabilities, nats: [T]; its gradient is finite where a probability is 0."""
    smallest = torch.finfo(probabilities_TE.dtype).tiny
    return -(probabilities_TE * probabilities_TE.clamp(min=smallest).log()).sum(dim=-1)


def token_sum(values: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Sum over tokens (the first axis) that are no padding; zero, with a gradient of zero, where there are none."""
    if mask_T is None:
        return values.sum(dim=0)
    padding = ~mask_T.view(-1, *(1,) * (values.dim() - 1))
    return values.masked_fill(padding, 0).sum(dim=0)


def token_count(values: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Tokens (the first axis) that are no padding: int64 scalar."""
    return torch.tensor(values.shape[0], device=values.device) if mask_T is None else mask_T.sum()


def balance_of(load_E: Tensor, mass_E: Tensor, tokens: Tensor) -> Tensor:
    """E sum_e f_e P_e from its counts: scalar fp32, 0 if no token chose any expert.

    Args:
        load_E: choices of each expert.
        mass_E: gate probability of each expert, summed over tokens.
        tokens: how many.
    """
    share_E = load_E.float() / load_E.float().sum().clamp(min=1)
    return load_E.shape[0] * (share_E * (mass_E / tokens.clamp(min=1))).sum()


def balance_loss(
    logits_TE: Tensor, indices_TK: Tensor, mask_T: Tensor | None = None, *, scores: Scores = "softmax"
) -> Tensor:
    """Switch / GShard balance loss of one layer (arXiv:2101.03961 eq. 4-6, arXiv:2006.16668).

    E * sum_e f_e * P_e, where f_e is the share of the layer's choices that fell on expert e (they sum to one whatever
    K is) and P_e the mean gate probability of e. It is 1.0 when choices or probabilities are spread evenly, up to E
    when all tokens choose one expert with certainty. transformers' figure is about K times as large. The gradient
    flows through P alone.

    Args:
        logits_TE: router logits.
        indices_TK: the experts that the router returned.
        mask_T: bool, False at padding.
        scores: how logits become probabilities.

    Returns:
        Scalar fp32; 0 if no token chose any expert.
    """
    load_E = expert_load(indices_TK, logits_TE.shape[1], mask_T)
    mass_E = token_sum(probabilities(logits_TE, scores), mask_T)
    return balance_of(load_E, mass_E, token_count(logits_TE, mask_T))


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Router z-loss: mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906 eq. 5). Scalar fp32."""
    squares = token_sum(logits_TE.float().logsumexp(dim=-1).square(), mask_T)
    return squares / token_count(logits_TE, mask_T).clamp(min=1)


def importance(weights_TK: Tensor, indices_TK: Tensor, experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Sum of the gate weights that each expert received: [E] fp32 (Shazeer et al., arXiv:1701.06538 eq. 6).

    Args:
        weights_TK: the weights that the router returned.
        indices_TK: the experts that it returned; E where a place stayed empty.
        experts: E.
        mask_T: bool, False at padding.
    """
    chosen_TK = indices_TK if mask_T is None else indices_TK.masked_fill(~mask_T.unsqueeze(-1), experts)
    sums_E = torch.zeros(experts + 1, dtype=torch.float32, device=weights_TK.device)
    return sums_E.scatter_add(0, chosen_TK.reshape(-1), weights_TK.float().reshape(-1))[:experts]


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation: variance over squared mean, 0 when all are equal (arXiv:1701.06538 eq. 7).

    Of `importance` it is a loss. Of `expert_load` it is a figure without gradient: counts are not differentiable.
    """
    values_E = values_E.float()
    return values_E.var(unbiased=False) / values_E.mean().square().clamp(min=1e-10)
