"""Losses that enter the backward pass where they arise, not through the trainer's loss.

Legend: T tokens, K choices a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Attach(torch.autograd.Function):
    """Identity on weights whose backward also sends a gradient of one into a loss."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device)


def attach_loss(weights_TK: Tensor, loss: Tensor) -> Tensor:
    """Weights that equal `weights_TK` and whose backward adds the gradient of `loss` (a scalar) to the graph."""
    attached: Tensor = _Attach.apply(weights_TK, loss)  # type: ignore[no-untyped-call]
    return attached
