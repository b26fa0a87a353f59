"""A model that is kept from choosing some of its experts, to hold a pruned one against: no weight is cut for it.

Legend: T tokens, E experts of a layer, K choices a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moekit.anatomy.probe import MoELayer, iterate_moe_layers


class _Masking(TorchFunctionMode):
    """Logits of these routers are minus infinity for some experts."""

    def __init__(self, dropped: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._dropped = dropped
        self.masked: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is nn.functional.linear:
            weight = id(args[1] if len(args) > 1 else (kwargs or {})["weight"])
            if weight in self._dropped:
                self.masked.add(weight)
                made[..., self._dropped[weight]] = float("-inf")
        return made


@contextmanager
def without(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> Iterator[list[str]]:
    """Within, the model's routers choose among these experts only.

    Args:
        model: whose E-sized biases of routers are changed for as long.
        kept: decoder layer -> experts that may be chosen.

    Yields:
        What shows, after the model has run, that it was not kept from choosing another; empty if it was.
    """
    told: list[str] = []
    dropped: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in iterate_moe_layers(model):
            keep = kept.get(layer.index)
            if keep is None:
                continue
            gone_D = torch.tensor([e for e in range(layer.geometry.experts) if e not in set(keep)])
            weights = [] if layer.router is None else _logit_weights(layer)
            if len(weights) != 1:
                told.append(f"layer {layer.index}: not one matrix makes the logits of its router")
                continue
            dropped[id(weights[0])] = gone_D
            stack.enter_context(_biases_masked(layer, gone_D))
            stack.callback(layer.experts.register_forward_pre_hook(_watching(layer, gone_D, told)).remove)
        mode = stack.enter_context(_Masking(dropped))
        yield told
        if mode.masked != set(dropped):
            told.append("the logits of some routers are made in another way")


def _logit_weights(layer: MoELayer) -> list[Tensor]:
    assert layer.router is not None
    shape = (layer.geometry.experts, layer.geometry.hidden)
    return [p for p in layer.router.parameters() if tuple(p.shape) == shape]


@contextmanager
def _biases_masked(layer: MoELayer, gone_D: Tensor) -> Iterator[None]:
    """Selection biases are added behind the logits: what they lift must not be chosen either."""
    assert layer.router is not None
    biases = [
        t for t in (*layer.router.parameters(), *layer.router.buffers()) if tuple(t.shape) == (layer.geometry.experts,)
    ]
    before = [bias.detach().clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias[gone_D] = float("-inf")
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, value in zip(biases, before, strict=True):
                bias.copy_(value)


def _watching(layer: MoELayer, gone_D: Tensor, told: list[str]) -> Any:
    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        index_TK = next((a for a in args if isinstance(a, Tensor) and not a.is_floating_point()), None)
        if index_TK is None or bool(torch.isin(index_TK, gone_D).any()):
            told.append(f"layer {layer.index} still chooses experts that are gone")

    return look
