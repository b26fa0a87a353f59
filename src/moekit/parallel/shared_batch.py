"""Ranks that hold the same tokens deal them out, so that none is sent or computed twice.

Legend: N tokens, M tokens of one rank's share, K choices, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moekit.errors import BadConfig
from moekit.parallel.autograd import apply
from moekit.parallel.dispatcher import Dispatcher, DispatchOptions, RunExperts
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.link import Link
from moekit.parallel.ranks import Ranks
from moekit.parallel.traffic import Traffic


@dataclass(eq=False)
class SharedBatch(Dispatcher):
    """A dispatcher for ranks that hold one batch together, as in generation: each dispatches an equal share.

    Attributes:
        peers: ranks that hold the same tokens.
        inner: dispatches the shares.
    """

    peers: Link = field(kw_only=True)
    inner: Dispatcher = field(kw_only=True)

    @classmethod
    def over(cls, layout: ExpertLayout, ranks: Ranks, options: DispatchOptions) -> SharedBatch:
        """It stands for no way of its own to send tokens: see `sharing`.

        Raises:
            BadConfig: always.
        """
        raise BadConfig("a shared batch needs a dispatcher to wrap", hint="SharedBatch.sharing(dispatcher, link)")

    @classmethod
    def sharing(cls, inner: Dispatcher, peers: Link) -> SharedBatch:
        """Wrap a dispatcher for ranks that hold the same tokens."""
        return cls(inner.layout, inner.options, peers=peers, inner=inner)

    def dispatch(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> tuple[int, Any]:
        """See the base class."""
        share = -(-len(x_NH) // self.peers.size)
        mine = slice(self.peers.rank * share, (self.peers.rank + 1) * share)
        x_MH, weights_MK = apply(_Share, x_NH, weights_NK, self.peers)
        return len(x_NH), self.inner.dispatch(x_MH, indices_NK[mine], weights_MK)

    def combine(self, flight: tuple[int, Any], run: RunExperts) -> Tensor:
        """See the base class."""
        tokens, inner = flight
        joined: Tensor = apply(_Join, self.inner.combine(inner, run), tokens, self.peers)
        return joined

    @property
    def traffic(self) -> dict[str, Traffic]:
        """See the base class."""
        return {**self.inner.traffic, "batch": self.peers.traffic}


def _join(part_MH: Tensor, tokens: int, link: Link) -> Tensor:
    share = -(-tokens // link.size)
    part_MH = torch.nn.functional.pad(part_MH, (0, 0, 0, share - len(part_MH)))
    link.traffic.sent("forward", "combine", [share] * link.size, part_MH.shape[1] * part_MH.element_size())
    return link.all_gather(part_MH)[:tokens]


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weights_NK: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        ctx.link, ctx.tokens, ctx.hidden = link, len(x_NH), x_NH.shape[1]
        share = -(-len(x_NH) // link.size)
        mine = slice(link.rank * share, (link.rank + 1) * share)
        return x_NH[mine], weights_NK[mine]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: Tensor, grad_MK: Tensor) -> tuple[Tensor, Tensor, None]:
        wide = torch.promote_types(grad_MH.dtype, grad_MK.dtype)
        whole = _join(torch.cat([grad_MH.to(wide), grad_MK.to(wide)], dim=1), ctx.tokens, ctx.link)
        return whole[:, : ctx.hidden].to(grad_MH.dtype), whole[:, ctx.hidden :].to(grad_MK.dtype), None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, part_MH: Tensor, tokens: int, link: Link) -> Tensor:
        ctx.link, ctx.mine = link, len(part_MH)
        return _join(part_MH, tokens, link)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None]:
        share = -(-len(grad_NH) // ctx.link.size)
        start = ctx.link.rank * share
        return grad_NH[start : start + ctx.mine], None, None
