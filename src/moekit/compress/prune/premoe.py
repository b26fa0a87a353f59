"""PreMoe: pruning by how surely the router picks an expert for a task (COLM 2026, arXiv:2505.17639).

A token's *pool* is the k experts of its largest logits; p is the softmax over the pool alone. A threshold on p that is
itself a mean over all tokens is known only at the end, so sums are kept by bins of p: whatever the number of tokens,
[E, 512] a layer. Logits are those before softmax or sigmoid, selection bias and groups.

Legend: N tokens, P members of a pool, E experts, B bins of p over [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.trace.batch import TokenBatch, accumulate, widest
from moekit.trace.vocabulary import BINS, Statistic, member_name, statistic_family


def utility(logits: Tensor) -> Tensor:
    """f(s) = max(s, sigmoid(s)): a logit, but never below 0, so that being chosen never counts against an expert."""
    return torch.maximum(logits, logits.sigmoid())


def _size(seen: TokenBatch, size: int) -> int:
    return min(size or seen.indices_NK.shape[1], seen.experts)


def pool(seen: TokenBatch, size: int) -> tuple[Tensor, Tensor, Tensor]:
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


def _binned(seen: TokenBatch, size: int, value: Callable[[Tensor], Tensor]) -> Tensor:
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

    def measure(seen: TokenBatch) -> Tensor:
        best_NP = seen.logits_NE.topk(_size(seen, members), dim=1).values
        return accumulate(best_NP.softmax(dim=1).amax(1).nan_to_num(0.0))

    doc = "Sum over tokens of the largest probability in their pool."
    return Statistic(member_name("pool_peak", members), "", ("logits",), "sum", False, doc, measure)


@register(
    name="premoe",
    kind="prune",
    paper="arXiv:2505.17639",
    needs=("load", "pool_utility(0)", "pool_peak(0)"),
    changes="weights",
    limits=(
        "Sees router logits only, as the model's own precision gives them: blind to how large an expert's output is.",
        f"The threshold is exact to 1/{BINS}: experts whose share lies less than that below it may count.",
        "token_score=tcess adds signed logits: a chosen expert of negative logits ranks below a chosen one of score 0.",
    ),
)
class PreMoe(PruneMethod):
    """Keep the experts the router picks for this task with high logits and high confidence.

    s is the raw router logit, C(x) the `pool` experts of the largest logits, p the softmax over C(x) alone. The score
    is the mean over all tokens x of f(s_i(x)) where i is in C(x) and p_i(x) >= r, else 0; f(s) = max(s, sigmoid(s)) is
    PEU (version 3 of the paper), f(s) = s is TCESS (version 1: pool=1, no threshold). The adaptive threshold is
    r = mean over x of max p(x), layer by layer; it acts on bins of p and is exact to 1/512. Choose it where the text of
    one task is at hand and experts' outputs are too dear to measure: it needs no more than the forward pass.
    """

    token_score: Literal["peu", "tcess"] = Field(
        default="peu", description="what a token adds: max(logit, sigmoid(logit)), or the logit itself"
    )
    pool: int | None = Field(
        default=None, ge=1, description="candidates a token; nothing: as many as the router chooses"
    )
    threshold: Literal["adaptive"] | Annotated[float, Field(ge=0, le=1)] | None = Field(
        default="adaptive",
        description="least p among a token's candidates that counts: adaptive, a number from 0 to 1, or null for none",
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """Both versions of the paper, and a fixed threshold over all experts."""
        return [
            cls(),
            cls(token_score="tcess", pool=1, threshold=None),
            cls(pool=geometry.experts, threshold=0.05),
        ]

    @property
    def required(self) -> tuple[str, ...]:
        """The load, the binned sums, and for the adaptive threshold the sum of the pools' largest probabilities."""
        size = self.pool or 0
        sums = member_name("pool_utility" if self.token_score == "peu" else "pool_logit", size)
        peak = (member_name("pool_peak", size),) if self.threshold == "adaptive" else ()
        return ("load", sums, *peak)

    def cut(self, inputs: LayerInputs) -> float:
        """The threshold r of a layer; 0 for none."""
        if isinstance(self.threshold, float):
            return self.threshold
        if self.threshold is None or not inputs.statistics.tokens:
            return 0.0
        return float(inputs.statistics[self.required[2]]) / inputs.statistics.tokens

    def score(self, inputs: LayerInputs) -> Tensor:
        """Mean over all tokens of what they add to each expert, [E]."""
        sums_EB = inputs.statistics[self.required[1]]
        if not inputs.statistics.tokens:
            return torch.zeros(inputs.experts, dtype=torch.float64)
        return above(sums_EB, self.cut(inputs)) / inputs.statistics.tokens
