"""What a MoE block was called with on each batch of a text, kept so that the block can be run again in other shapes.

Hidden states lie where a walk's states lie, so that memory holds one batch of them.

Legend: B rows, S positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, flat_output
from moekit.errors import UnsupportedModel
from moekit.streaming.nested import mapped
from moekit.streaming.passes import Passes
from moekit.streaming.states import States


class BlockCalls:
    """What a block was called with on each batch, its hidden states apart from the rest.

    Args:
        states: where hidden states are kept.
    """

    def __init__(self, states: States) -> None:
        self.states = states
        self._rest: dict[int, tuple[list[Any], dict[str, Any], int | str, torch.Size]] = {}

    def keep(self, number: int, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Keep a call; False if no argument holds the hidden states of the whole batch."""
        rows, length = self.states.shapes[number]
        # New tensors over the same storage: the pass may put away what its own lie in.
        rest, named = mapped((list(args), dict(kwargs)), Tensor.detach)
        given: list[tuple[int | str, Any]] = [*enumerate(rest), *named.items()]
        for key, value in given:
            if isinstance(value, Tensor) and value.numel() == rows * length * self.states.hidden:
                self.states.put(number, value.reshape(rows, length, -1).to(self.states.dtype))
                if isinstance(key, int):
                    rest[key] = None
                else:
                    named[key] = None
                self._rest[number] = (rest, named, key, value.shape)
                return True
        return False

    def get(self, number: int, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keywords of a call."""
        rest, named, key, shape = self._rest[number]
        rest, named = list(rest), dict(named)
        hidden = self.states.get(number).to(device).reshape(shape)
        if isinstance(key, int):
            rest[key] = hidden
        else:
            named[key] = hidden
        return rest, named


def see_block(
    moe: MoELayer, passes: Passes, calls: BlockCalls, outputs: States | None = None, *, go_on: bool = False
) -> None:
    """Run a loaded layer on every batch, and keep what its block is called with.

    Args:
        moe: the layer.
        passes: that stand before it.
        calls: where calls are kept.
        outputs: where what the block gives is kept; None keeps none of it.
        go_on: let what the layer answers go on to the next one.

    Raises:
        UnsupportedModel: the block is not called once on all positions of a batch.
    """
    seen: list[int] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.extend([number] * calls.keep(number, args, kwargs))
        if outputs is not None:
            kept = flat_output(output).reshape(*outputs.shapes[number], outputs.hidden)
            outputs.put(number, kept.to(outputs.dtype))

    handle = moe.block.register_forward_hook(see, with_kwargs=True)
    try:
        for number in range(len(passes)):
            passes.run(moe.index, number)
            if go_on:
                passes.go_on(moe.index, number)
    finally:
        handle.remove()
    if seen != list(range(len(passes))):
        raise UnsupportedModel(
            "the experts stand in no block of their own, which could be run alone",
            layer=moe.index,
            hint="choose a method that decides from statistics (moekit methods prune)",
        )
