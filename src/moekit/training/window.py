"""Which calls of a model's modules belong to a training forward that counts.

A *window* opens and closes with the forward of the whole model; what its modules do outside of it is a repetition by
activation checkpointing, which must build the same graph again but counts nowhere. Evaluation and forwards without
gradients are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.errors import BadData
from moekit.training.batch import MakeBatch, MicroBatch


class Window:
    """Follows the forwards of a model, and keeps ids and mask of the latest one that trains.

    Args:
        model: the model whose forward is called with the batch (peft-wrapped or not; not its DDP wrapper).
        make_batch: says more of a micro-batch than its ids and its mask.

    Attributes:
        inside: whether a forward of the whole model is running.
        batch: the micro-batch of the latest training forward.
    """

    def __init__(self, model: nn.Module, make_batch: MakeBatch = MicroBatch) -> None:
        self._make_batch = make_batch
        self._armed = False
        self.inside = False
        self.batch = MicroBatch()
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]

    def close(self) -> None:
        """Remove its hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.batch = MicroBatch()

    def trains(self, module: nn.Module) -> bool:
        """Whether a call of this module is part of a training forward, or of its repetition."""
        return module.training and (not self.inside or self._armed)

    def mask(self, tokens: int, layer: int) -> Tensor | None:
        """The attention mask of the micro-batch as [T] bool; None without one.

        Args:
            tokens: T, that a module of the layer saw.
            layer: decoder layer index, for the message.

        Raises:
            BadData: the mask is one of other positions.
        """
        mask_BS = self.batch.mask_BS
        if mask_BS is None:
            return None
        if mask_BS.numel() != tokens:
            raise BadData(
                f"the attention mask covers {mask_BS.numel()} positions, but the router saw {tokens} tokens",
                layer=layer,
                hint="train without virtual tokens or context parallelism, and run one backward per forward",
            )
        return mask_BS.reshape(-1).bool()

    def _open(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.inside = True
        # A forward for evaluation or of a reference must not disturb the repetitions that are still to come.
        self._armed = model.training and torch.is_grad_enabled()
        if self._armed:
            ids = kwargs.get("input_ids", args[0] if args else None)
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            usable = isinstance(mask, Tensor) and mask.dim() == 2
            self.batch = self._make_batch(ids, mask if usable else None)

    def _close(self, *_: object) -> None:
        self.inside = False
