"""How sure the router is of each candidate, token by token, kept as histograms so that a threshold can come later.

A token's *pool* is the k experts of its largest logits; p is the softmax over the pool alone. A threshold on p that is
itself a mean over all tokens is known only at the end, so sums are kept by bins of p: whatever the number of tokens,
[E, 512] a layer. Logits are those before softmax or sigmoid, selection bias and groups (arXiv:2505.17639).

Legend: N tokens, P members of a pool, E experts, B bins of p over [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moekit.trace.observation import Observation, accumulate, widest
from moekit.trace.vocabulary import BINS, Statistic, member_name, statistic_family


def utility(logits: Tensor) -> Tensor:
    """f(s) = max(s, sigmoid(s)): a logit, but never below 0, so that being chosen never counts against an expert."""
    return torch.maximum(logits, logits.sigmoid())


def _size(seen: Observation, size: int) -> int:
    return min(size or seen.indices_NK.shape[1], seen.experts)


def pool(seen: Observation, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's pool: experts [N, P], their logits [N, P] and p [N, P], best first; ties go to the lower expert.

    Args:
        seen: tokens with logits.
        size: members; 0 for as many as the router chooses.
    """
    ordered = seen.logits_NE.sort(dim=1, descending=True, stable=True)
    members = slice(_size(seen, size))
    logits_NP = ordered.values[:, members]
    # Only a token that may choose no expert at all has no p.
    return ordered.indices[:, members], logits_NP, logits_NP.softmax(dim=1).nan_to_num(0.0)


def _binned(seen: Observation, size: int, value: Callable[[Tensor], Tensor]) -> Tensor:
    experts_NP, logits_NP, p_NP = pool(seen, size)
    # A forbidden expert (logit -inf) may fill up a pool; it counts as 0.
    values_NP = value(logits_NP).masked_fill(logits_NP == float("-inf"), 0.0)
    cell_NP = experts_NP * BINS + (p_NP * BINS).long().clamp_max(BINS - 1)
    wide = widest(values_NP.device)
    sums = torch.zeros(seen.experts * BINS, dtype=wide, device=values_NP.device)
    return sums.index_add_(0, cell_NP.flatten(), values_NP.flatten().to(wide)).view(seen.experts, BINS)


def above(sums_EB: Tensor, threshold: float) -> Tensor:
    """Sum over the members of pools with p >= threshold, [E] fp64, exact to a bin.

    The bin that holds the threshold is counted whole: members whose p lies less than 1/512 below it may be in.

    Args:
        sums_EB: a statistic of this module.
        threshold: 0 to 1; 0 takes all.
    """
    first = min(max(int(threshold * BINS), 0), BINS - 1)
    return sums_EB[:, first:].double().sum(1)


def _whole(size: float) -> int:
    if size < 0 or size != int(size):
        raise ValueError("a pool has a whole number of members, 0 for as many as the router chooses")
    return int(size)


@statistic_family
def pool_utility(size: float) -> Statistic:
    """Sum of max(s, sigmoid(s)) over the tokens in whose pool of `size` the expert is, by bins of p: [E, B].

    Raises:
        ValueError: not a whole number, or negative.
    """
    members = _whole(size)
    return Statistic(
        member_name("pool_utility", members),
        "EB",
        ("logits",),
        "sum",
        False,
        "Sum of max(s, sigmoid(s)) over tokens whose pool holds the expert, by bins of its probability there.",
        lambda seen: _binned(seen, members, utility),
    )


@statistic_family
def pool_logit(size: float) -> Statistic:
    """Sum of the logit s over the tokens in whose pool of `size` the expert is, by bins of p: [E, B].

    Raises:
        ValueError: not a whole number, or negative.
    """
    members = _whole(size)
    return Statistic(
        member_name("pool_logit", members),
        "EB",
        ("logits",),
        "sum",
        False,
        "Sum of the logits of tokens whose pool holds the expert, by bins of its probability there.",
        lambda seen: _binned(seen, members, lambda logits: logits),
    )


@statistic_family
def pool_peak(size: float) -> Statistic:
    """Sum over tokens of the largest p in their pool of `size`; a single number.

    Raises:
        ValueError: not a whole number, or negative.
    """
    members = _whole(size)

    def measure(seen: Observation) -> Tensor:
        best_NP = seen.logits_NE.topk(_size(seen, members), dim=1).values
        return accumulate(best_NP.softmax(dim=1).amax(1).nan_to_num(0.0))

    doc = "Sum over tokens of the largest probability in their pool."
    return Statistic(member_name("pool_peak", members), "", ("logits",), "sum", False, doc, measure)
