"""The second of a token's two experts: where its weight is small beside the first's, and a routing without it.

Legend: T tokens, E experts, K choices a token (2 here), B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.errors import BadConfig, BadData
from moekit.runtime.part import PlanInputs
from moekit.runtime.router import Routed, RouteInputs


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


def refuse_other_than_two(top_k: int, layer: int, hint: str) -> None:
    """Refuse models that do not choose two experts a token.

    Raises:
        BadConfig: they choose another number.
    """
    if top_k != 2:
        raise BadConfig(
            f"a token chooses {top_k} expert(s) here; skipping the second is defined for 2", layer=layer, hint=hint
        )


def median_ratio(inputs: PlanInputs, knob: str) -> Tensor:
    """A layer's median of second to first weight on the calibration text, a scalar in fp32.

    Args:
        inputs: with the statistic gate_ratio.
        knob: the setting that makes the trace needless.

    Raises:
        BadData: the trace lacks the ratios, or no token chose two experts.
    """
    counts_B = inputs.statistics.get("gate_ratio")
    if counts_B is None or not int(counts_B.sum()):
        what = "has no ratios of gate weights" if counts_B is None else "holds no token with two experts"
        raise BadData(
            f"the trace {what}",
            layer=inputs.layer,
            hint=f"profile again with --statistics gate_ratio, or give {knob}",
        )
    return torch.tensor(median(counts_B), dtype=torch.float32)


def skip_second(
    inputs: RouteInputs, routed: Routed, threshold: float | Tensor, keeps_T: Tensor | None = None
) -> Routed:
    """Leave the smaller of two weights out where it is below the threshold times the larger.

    A skipped choice is expert E with weight 0; the other gets what the family would give it as the only choice. Where a
    choice is nobody's already (`MergeRedirect`), whatever answers in its place has its gate and costs nothing: such
    tokens stay as they are.

    Args:
        inputs: of the router.
        routed: two choices a token.
        threshold: a scalar.
        keeps_T: tokens that keep both, whatever their weights; None for no such token.

    Raises:
        BadConfig: a token has another number of choices.
    """
    weights_TK, indices_TK = routed.weights, routed.indices
    refuse_other_than_two(
        indices_TK.shape[1],
        inputs.layer,
        "choose two experts before (topk with top_k 2), or leave skipping out",
    )
    # A selection bias may put the smaller weight first.
    first_T1 = weights_TK.argmax(dim=1, keepdim=True)
    largest_T1, second_T1 = weights_TK.gather(1, first_T1), weights_TK.gather(1, 1 - first_T1)
    skip_T1 = second_T1.float() < threshold * largest_T1.float()
    skip_T1 = skip_T1 & (indices_TK < inputs.geometry.experts).all(dim=1, keepdim=True)
    if keeps_T is not None:
        skip_T1 = skip_T1 & ~keeps_T.unsqueeze(1)
    chosen_T1 = indices_TK.gather(1, first_T1).clamp_max(inputs.geometry.experts - 1)
    alone_T1 = inputs.gate.weigh(inputs.logits, chosen_T1).to(weights_TK.dtype)
    stays_TK = torch.arange(2, device=first_T1.device) == first_T1
    skipped_TK = torch.where(stays_TK, alone_T1, torch.zeros_like(alone_T1))
    weights_TK = torch.where(skip_T1, skipped_TK, weights_TK)
    return Routed(weights_TK, indices_TK.masked_fill(skip_T1 & ~stays_TK, inputs.geometry.experts))
