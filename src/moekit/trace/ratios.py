"""How far a token's second gate weight lies below its first: a histogram, from which quantiles follow.

Legend: N tokens, K choices a token, B bins over [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.observation import Observation
from moekit.trace.vocabulary import BINS, statistic


@statistic(shape="B", sources=("weights",), integer=True)
def gate_ratio(seen: Observation) -> Tensor:
    """Tokens by the ratio of their second largest to their largest gate weight, in equal bins over [0, 1].

    Tokens with fewer than two experts of positive weight are left out.
    """
    if seen.indices_NK.shape[1] < 2:
        return torch.zeros(BINS, dtype=torch.int64, device=seen.indices_NK.device)
    first_N, second_N = seen.weights_NK.topk(2, dim=1).values.unbind(dim=1)
    ratio_n = (second_N / first_N)[second_N > 0]
    return torch.bincount((ratio_n * BINS).long().clamp_max(BINS - 1), minlength=BINS)


def median(counts_B: Tensor) -> float:
    """Lower median of what a histogram over [0, 1] counted, exact to a bin: the middle of its bin.

    Raises:
        ValueError: nothing was counted.
    """
    total = int(counts_B.sum())
    if not total:
        raise ValueError("the histogram is empty")
    bins = counts_B.numel()
    place = int((counts_B.cumsum(0) < (total + 1) // 2).sum())
    return (place + 0.5) / bins
