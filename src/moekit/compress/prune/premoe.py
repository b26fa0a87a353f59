"""PreMoe: pruning by how surely the router picks an expert for a task (COLM 2026, arXiv:2505.17639).

Legend: E experts, B bins of probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.trace.pools import above
from moekit.trace.vocabulary import BINS, member_name


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
