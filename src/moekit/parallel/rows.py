"""Rows out and partial sums back as autograd sees them: backward of dispatch is combine, and the other way round.

Legend: N tokens, K choices, H hidden size, P rows sent, Q rows received, S slots a row, B bytes of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moekit.parallel.autograd import apply
from moekit.parallel.link import Link, PendingRows
from moekit.parallel.plan import DispatchPlan
from moekit.parallel.wire import Codec, RowFormat, dequantize, gather_rows, quantize


@dataclass(eq=False)
class Journey:
    """Rows of one layer between leaving and coming back.

    Attributes:
        link: the ranks.
        plan: what was sent.
        send: rows for each rank.
        receive: rows from each rank.
        outward: format of packed rows on the way out.
        pending: rows under way, None once arrived.
    """

    link: Link
    plan: DispatchPlan
    send: list[int]
    receive: list[int]
    outward: RowFormat
    pending: PendingRows | None


def depart(x_NH: Tensor, weights_NK: Tensor, plan: DispatchPlan, link: Link, codec: Codec = "none") -> Journey:
    """Pack rows and send them off; the counts travel while the rows are packed.

    Args:
        x_NH: hidden states.
        weights_NK: router weights.
        plan: rows to send.
        link: the ranks.
        codec: of the hidden states on the way out.
    """
    counts = link.exchange_counts(plan.counts_R)
    x_NH, weights_NK = x_NH.detach(), weights_NK.detach()
    outward = RowFormat(
        hidden=x_NH.shape[1],
        dtype=x_NH.dtype,
        slots=plan.slots,
        weight_dtype=weights_NK.dtype,
        ids=True,
        most=plan.none,
        codec=codec,
    )
    packed_PB = outward.empty(len(plan.token_P), x_NH.device)
    if codec == "int8":
        values_NH, scales_NJ = quantize(x_NH)
        gather_rows(outward.states(packed_PB), values_NH, plan.token_P)
        gather_rows(outward.scales(packed_PB), scales_NJ, plan.token_P)
    else:
        gather_rows(outward.states(packed_PB), x_NH, plan.token_P)
    outward.weights(packed_PB).copy_(_slots(weights_NK, plan))
    outward.local_ids(packed_PB).copy_(plan.local_PS)
    send, receive = counts.wait()
    pending = link.exchange_rows(packed_PB, send, receive, "forward", "dispatch")
    return Journey(link, plan, send, receive, outward, pending)


def _slots(values_NK: Tensor, plan: DispatchPlan) -> Tensor:
    """Router weights of each row's slots, 0 where empty: [P, S]."""
    flat = torch.cat([values_NK.reshape(-1), values_NK.new_zeros(1)])
    return flat[plan.choice_PS]


def arrive(x_NH: Tensor, weights_NK: Tensor, journey: Journey) -> tuple[Tensor, Tensor, Tensor]:
    """Wait for the rows of all ranks.

    Returns:
        Hidden states [Q, H], router weights [Q, S] and local ids [Q, S] int64.
    """
    rows_QH, weights_QS, local_QS = apply(_Arrive, x_NH, weights_NK, journey)
    return rows_QH, weights_QS, local_QS


def combine(sums_QH: Tensor, journey: Journey) -> Tensor:
    """Send each row's partial sum back and add up what belongs to one token: [N, H]."""
    combined: Tensor = apply(_Combine, sums_QH, journey)
    return combined


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weights_NK: Tensor, journey: Journey) -> tuple[Tensor, Tensor, Tensor]:
        assert journey.pending is not None
        packed_QB = journey.pending.wait()
        journey.pending = None
        outward = journey.outward
        rows_QH = outward.states(packed_QB)
        if outward.codec == "int8":
            rows_QH = dequantize(rows_QH, outward.scales(packed_QB), outward.dtype)
        weights_QS = outward.weights(packed_QB).clone()
        local_QS = outward.local_ids(packed_QB).long()
        ctx.journey, ctx.shape = journey, weights_NK.shape
        ctx.mark_non_differentiable(local_QS)
        return rows_QH, weights_QS, local_QS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QH: Tensor, grad_QS: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        journey: Journey = ctx.journey
        plan, outward = journey.plan, journey.outward
        homeward = RowFormat(
            hidden=outward.hidden, dtype=outward.dtype, slots=outward.slots, weight_dtype=outward.weight_dtype
        )
        packed_QB = homeward.empty(len(grad_QH), grad_QH.device)
        homeward.states(packed_QB).copy_(grad_QH)
        homeward.weights(packed_QB).copy_(grad_QS)
        pending = journey.link.exchange_rows(packed_QB, journey.receive, journey.send, "backward", "dispatch")
        packed_PB = pending.wait()
        grad_NH = _sum_by_token(homeward.states(packed_PB), plan)
        tokens, choices = ctx.shape
        flat = homeward.weights(packed_PB).new_zeros(tokens * choices + 1)
        flat[plan.choice_PS.reshape(-1)] = homeward.weights(packed_PB).reshape(-1)
        return grad_NH, flat[:-1].view(tokens, choices), None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, sums_QH: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        pending = journey.link.exchange_rows(sums_QH.contiguous(), journey.receive, journey.send, "forward", "combine")
        return _sum_by_token(pending.wait(), journey.plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        journey: Journey = ctx.journey
        rows_PH = grad_NH.index_select(0, journey.plan.token_P)
        pending = journey.link.exchange_rows(rows_PH, journey.send, journey.receive, "backward", "combine")
        return pending.wait(), None


def _sum_by_token(rows_PH: Tensor, plan: DispatchPlan) -> Tensor:
    """Add rows onto their tokens, in fp32 where they are narrower."""
    wide = torch.float32 if rows_PH.dtype.itemsize < 4 else rows_PH.dtype
    sums_NH = torch.zeros(plan.tokens, rows_PH.shape[1], dtype=wide, device=rows_PH.device)
    return sums_NH.index_add_(0, plan.token_P, rows_PH.to(wide)).to(rows_PH.dtype)
