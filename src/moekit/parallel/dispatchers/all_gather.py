"""Every token to every rank, and the sums scattered back: no plan, most bytes.

Legend: N tokens, M tokens of the rank that has most, K choices, H hidden size, Q = R * M rows, B bytes of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moekit.catalogue import register
from moekit.parallel.autograd import apply
from moekit.parallel.dispatcher import Dispatcher, DispatchOptions, RunExperts, run_local
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.link import Link
from moekit.parallel.ranks import Ranks
from moekit.parallel.traffic import Pass, Traffic, Way
from moekit.parallel.wire import RowFormat


@dataclass(frozen=True, eq=False)
class Gathered:
    """Tokens of all ranks."""

    tokens: int
    rows_QH: Tensor
    weights_QK: Tensor
    ids_QK: Tensor


@register(
    name="all-gather",
    kind="dispatch",
    changes="runtime",
    limits=("sends every token to every rank, whatever its experts", "ranks with fewer tokens send padding"),
)
@dataclass(eq=False)
class AllGather(Dispatcher):
    """Gather all ranks' tokens everywhere, run local experts on them, reduce-scatter the sums (Megatron's allgather).

    It needs no counts of rows and no plan. Choose it for few ranks, where a token touches nearly all of them anyway.

    Attributes:
        link: the ranks.
    """

    link: Link = field(default_factory=Link)

    @classmethod
    def over(cls, layout: ExpertLayout, ranks: Ranks, options: DispatchOptions) -> AllGather:
        """See the base class."""
        return cls(layout, options, Link(ranks.group))

    def dispatch(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Gathered:
        """See the base class."""
        link, layout = self.link, self.layout
        most = _most_tokens(len(x_NH), link, x_NH.device)
        # One id says rank and place: the receiver keeps those of its own rank.
        ids_NK = layout.rank_E[indices_NK] * (layout.most + 1) + layout.local_E[indices_NK]
        ids_MK = _padded(ids_NK, most, layout.ranks * (layout.most + 1))
        rows = apply(_Gather, _padded(x_NH, most), _padded(weights_NK, most), ids_MK, self)
        return Gathered(len(x_NH), *rows)

    def combine(self, flight: Gathered, run: RunExperts) -> Tensor:
        """See the base class."""
        link, layout = self.link, self.layout
        own_QK = flight.ids_QK // (layout.most + 1) == link.rank
        local_QK = torch.where(own_QK, flight.ids_QK % (layout.most + 1), layout.most)
        sums_QH = run_local(run, flight.rows_QH, local_QK, flight.weights_QK, layout.counts[link.rank])
        sums_MH: Tensor = apply(_Scatter, sums_QH, link)
        return sums_MH[: flight.tokens]

    @property
    def traffic(self) -> dict[str, Traffic]:
        """See the base class."""
        return {"ranks": self.link.traffic}


def _most_tokens(tokens: int, link: Link, device: torch.device) -> int:
    most = torch.tensor([tokens], device=device)
    link.traffic.counted([most.element_size()] * link.size)
    link.call(lambda: dist.all_reduce(most, dist.ReduceOp.MAX, group=link.group))
    return int(most)


def _padded(values: Tensor, rows: int, fill: float = 0) -> Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, rows - len(values)), value=fill)


def _all_gather(values: Tensor, link: Link, direction: Pass, way: Way) -> Tensor:
    link.traffic.sent(direction, way, [len(values)] * link.size, values.shape[1] * values.element_size())
    return link.all_gather(values)


def _reduce_scatter(values: Tensor, link: Link, direction: Pass, way: Way) -> Tensor:
    own = len(values) // link.size
    link.traffic.sent(direction, way, [own] * link.size, values.shape[1] * values.element_size())
    return link.reduce_scatter(values)


class _Gather(Function):
    @staticmethod
    def forward(
        ctx: Any, x_MH: Tensor, weights_MK: Tensor, ids_MK: Tensor, dispatcher: AllGather
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.link, ctx.hidden = dispatcher.link, x_MH.shape[1]
        layout = dispatcher.layout
        form = RowFormat(
            hidden=x_MH.shape[1],
            dtype=x_MH.dtype,
            slots=weights_MK.shape[1],
            weight_dtype=weights_MK.dtype,
            ids=True,
            most=(layout.ranks + 1) * (layout.most + 1),
        )
        packed_MB = form.empty(len(x_MH), x_MH.device)
        form.states(packed_MB).copy_(x_MH)
        form.weights(packed_MB).copy_(weights_MK)
        form.local_ids(packed_MB).copy_(ids_MK)
        packed_QB = _all_gather(packed_MB, dispatcher.link, "forward", "dispatch")
        ids_QK = form.local_ids(packed_QB).long()
        ctx.mark_non_differentiable(ids_QK)
        return form.states(packed_QB), form.weights(packed_QB).clone(), ids_QK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QH: Tensor, grad_QK: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # Sums need numbers of one type; the wider of both loses nothing.
        wide = torch.promote_types(grad_QH.dtype, grad_QK.dtype)
        both = torch.cat([grad_QH.to(wide), grad_QK.to(wide)], dim=1)
        own = _reduce_scatter(both, ctx.link, "backward", "dispatch")
        return own[:, : ctx.hidden].to(grad_QH.dtype), own[:, ctx.hidden :].to(grad_QK.dtype), None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, sums_QH: Tensor, link: Link) -> Tensor:
        ctx.link = link
        return _reduce_scatter(sums_QH, link, "forward", "combine")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad_MH, ctx.link, "backward", "combine"), None
