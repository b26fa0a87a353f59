"""NAEE's dynamic skipping: leave a token's second expert out where its weight is small (arXiv:2402.14800).

Legend: T and N tokens, E experts, K choices a token (2 here), B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig, BadData
from moekit.runtime.part import PlanInputs
from moekit.runtime.router import LimitPart, Routed, RouteInputs
from moekit.trace.batch import TokenBatch
from moekit.trace.vocabulary import BINS, statistic


@statistic(shape="B", sources=("weights",), integer=True)
def gate_ratio(seen: TokenBatch) -> Tensor:
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


@register(
    name="naee-skip",
    kind="routing",
    paper="arXiv:2402.14800",
    needs=("gate_ratio",),
    changes="routing",
    stock=False,
    traits=("variable_k",),
    limits=(
        "For models that choose two experts a token.",
        "Saves time only where the experts' kernels skip choices of no expert.",
    ),
)
class NAEESkip(LimitPart):
    """A token's second expert is skipped where its weight is below beta times the first expert's.

    With w1 >= w2 the weights of a token's two experts, the second is skipped if w2 < beta w1, and the first gets the
    weight the family would give it as the only choice: 1 where the family renormalises. beta is each layer's median of
    w2 / w1 on the calibration text, so that about half the tokens need one expert only. Choose it to spend less time on
    a top-2 model without changing its weights, after pruning or instead of it.
    """

    axes: ClassVar[Mapping[str, str]] = {"beta": ""}

    beta: float | None = Field(
        default=None, ge=0, le=1, description="threshold for all layers; None takes each layer's median from the trace"
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[NAEESkip]:
        """Some tokens skip, and all do."""
        return [cls(beta=0.5), cls(beta=1.0)]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse models that do not choose two experts a token."""
        if geometry.top_k != 2:
            raise BadConfig(
                f"a token chooses {geometry.top_k} expert(s) here; skipping the second is defined for 2",
                layer=layer,
                hint="use the topk policy with a smaller top_k",
            )

    def plan(self, inputs: PlanInputs) -> dict[str, Tensor]:
        """The layer's beta, a scalar in fp32; nothing where the knob gives it.

        Raises:
            BadData: the trace lacks the ratios, or no token chose two experts.
        """
        if self.beta is not None:
            return {}
        counts_B = inputs.statistics.get("gate_ratio")
        if counts_B is None or not int(counts_B.sum()):
            what = "has no ratios of gate weights" if counts_B is None else "holds no token with two experts"
            raise BadData(
                f"the trace {what}",
                layer=inputs.layer,
                hint="profile again with --statistics gate_ratio, or give beta",
            )
        return {"beta": torch.tensor(median(counts_B), dtype=torch.float32)}

    def limit(self, inputs: RouteInputs, routed: Routed) -> Routed:
        """Skip the second of two choices; a skipped choice is expert E with weight 0."""
        gate, logits_TE = inputs.gate, inputs.logits
        weights_TK, indices_TK = routed.weights, routed.indices
        if indices_TK.shape[1] != 2:
            raise BadConfig(
                f"a token chooses {indices_TK.shape[1]} expert(s) here; skipping the second is defined for 2",
                layer=inputs.layer,
                hint="choose two experts before (topk with top_k 2), or leave skipping out",
            )
        # A selection bias may put the smaller weight first.
        first_T1 = weights_TK.argmax(dim=1, keepdim=True)
        largest_T1, second_T1 = weights_TK.gather(1, first_T1), weights_TK.gather(1, 1 - first_T1)
        beta = inputs.constants["beta"] if self.beta is None else self.beta
        skip_T1 = second_T1.float() < beta * largest_T1.float()
        alone_T1 = gate.weigh(logits_TE, indices_TK.gather(1, first_T1)).to(weights_TK.dtype)
        stays_TK = torch.arange(2, device=first_T1.device) == first_T1
        skipped_TK = torch.where(stays_TK, alone_T1, torch.zeros_like(alone_T1))
        weights_TK = torch.where(skip_T1, skipped_TK, weights_TK)
        return Routed(weights_TK, indices_TK.masked_fill(skip_T1 & ~stays_TK, inputs.geometry.experts))
