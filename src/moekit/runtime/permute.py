"""Parts follow when a model's experts are reordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from moekit.runtime.attachment import attached


@torch.no_grad()
def permute_parts(model: nn.Module, orders: Mapping[int, Sequence[int]]) -> None:
    """Reorder the tensors of all attached parts, `order[new] = old`; layers not named stay as they are.

    The experts themselves are reordered by `moekit.anatomy.permute_experts`. What is learned stays the same tensor
    objects, so that an optimizer keeps them.
    """
    for attachment in attached(model):
        for layer, on in attachment.layers.items():
            if layer not in orders:
                continue
            order = list(orders[layer])
            on.set_constants(attachment.part.permute(on.stored, order))
            if on.learned is not None:
                state = on.learned.state_dict()
                for name, tensor in attachment.part.permute(state, order).items():
                    state[name].copy_(tensor)
