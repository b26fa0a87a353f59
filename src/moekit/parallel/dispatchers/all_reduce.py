"""No token travels: all ranks hold the same tokens, and the sums are added up everywhere.

Legend: N tokens, K choices, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

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


@register(
    name="all-reduce",
    kind="dispatch",
    changes="runtime",
    limits=("all ranks must hold the same tokens: for generation, not for data-parallel training",),
)
@dataclass(eq=False)
class AllReduce(Dispatcher):
    """Run local experts on the tokens that all ranks share, and all-reduce the sums.

    No split is read back to the host, so nothing waits for counts: the choice for decoding, one token at a time.

    Attributes:
        link: the ranks.
    """

    needs_shared_batch: ClassVar[bool] = True
    link: Link = field(default_factory=Link)

    @classmethod
    def over(cls, layout: ExpertLayout, ranks: Ranks, options: DispatchOptions) -> AllReduce:
        """See the base class."""
        return cls(layout, options, Link(ranks.group))

    def dispatch(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        return x_NH, indices_NK, weights_NK

    def combine(self, flight: tuple[Tensor, Tensor, Tensor], run: RunExperts) -> Tensor:
        """See the base class."""
        x_NH, indices_NK, weights_NK = flight
        link, layout = self.link, self.layout
        rows_NH, gates_NK = apply(_Share, x_NH, weights_NK, link)
        local_NK = layout.local_E[indices_NK].masked_fill(layout.rank_E[indices_NK] != link.rank, layout.most)
        sums_NH = run_local(run, rows_NH, local_NK, gates_NK, layout.counts[link.rank])
        total: Tensor = apply(_Sum, sums_NH, link)
        return total

    @property
    def traffic(self) -> dict[str, Traffic]:
        """See the base class."""
        return {"ranks": self.link.traffic}


def _all_reduce(values: Tensor, link: Link, direction: Pass, way: Way) -> Tensor:
    total = values.contiguous().clone()
    # A ring moves 2 (R - 1) / R of the tensor over every link: as if each rank got 2 / R of its rows.
    share = values.shape[1] * values.element_size() * 2 // link.size
    link.traffic.sent(direction, way, [len(values)] * link.size, share)
    link.call(lambda: dist.all_reduce(total, group=link.group))
    return total


class _Share(Function):
    """The same tokens on all ranks; each rank's gradient is of its own experts alone, so they are summed."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weights_NK: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        ctx.link = link
        return x_NH.view_as(x_NH), weights_NK.view_as(weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor, grad_NK: Tensor) -> tuple[Tensor, Tensor, None]:
        wide = torch.promote_types(grad_NH.dtype, grad_NK.dtype)
        both = torch.cat([grad_NH.to(wide), grad_NK.to(wide)], dim=1)
        total = _all_reduce(both, ctx.link, "backward", "dispatch")
        hidden = grad_NH.shape[1]
        return total[:, :hidden].to(grad_NH.dtype), total[:, hidden:].to(grad_NK.dtype), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, sums_NH: Tensor, link: Link) -> Tensor:
        return _all_reduce(sums_NH, link, "forward", "combine")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        return grad_NH, None
