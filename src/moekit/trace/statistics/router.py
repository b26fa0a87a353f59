"""What routers score, chosen or not.

Legend: N tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.batch import TokenBatch, accumulate, widest
from moekit.trace.vocabulary import statistic


@statistic(shape="E", sources=("logits",))
def soft_frequency(seen: TokenBatch) -> Tensor:
    """Sum of router scores over all tokens, chosen or not (soft counting, arXiv:2404.05089)."""
    return accumulate(seen.scores_NE, 0)


@statistic(shape="E", sources=("logits",))
def chosen_score(seen: TokenBatch) -> Tensor:
    """Sum of router scores over the tokens that chose the expert, before weights are normalised (arXiv:2410.06270)."""
    return accumulate(seen.scores_NE * seen.chosen_NE, 0)


def _finite(logits_NE: Tensor) -> Tensor:
    # A router may forbid experts with -inf; such logits count as 0 in moments.
    return logits_NE.masked_fill(logits_NE == float("-inf"), 0.0)


@statistic(shape="E", sources=("logits",))
def logit_sum(seen: TokenBatch) -> Tensor:
    """Sum of router logits over all tokens."""
    return accumulate(_finite(seen.logits_NE), 0)


@statistic(shape="E", sources=("logits",))
def logit_square(seen: TokenBatch) -> Tensor:
    """Sum of squared router logits over all tokens."""
    return accumulate(_finite(seen.logits_NE).square(), 0)


@statistic(shape="EE", sources=("logits",))
def logit_gram(seen: TokenBatch) -> Tensor:
    """Gram matrix of the experts' logits over all tokens; cosines follow (M-SMoE, arXiv:2310.01334)."""
    # Wide before they are multiplied: columns that nearly agree differ by what fp32 products would round away.
    logits_NE = _finite(seen.logits_NE).to(widest(seen.logits_NE.device))
    return logits_NE.T @ logits_NE


@statistic(shape="", sources=("logits",))
def score_entropy(seen: TokenBatch) -> Tensor:
    """Sum over tokens of the entropy of the (normalised) router scores, in nats."""
    share_NE = seen.scores_NE / seen.scores_NE.sum(-1, keepdim=True)
    return accumulate(torch.special.entr(share_NE))
