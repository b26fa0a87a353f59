"""What tokens choose in layers whose routers give no logits, during training forwards.

Legend: T tokens, K choices a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from moekit.errors import MoekitError
from moekit.trace.seam import see_choices
from moekit.training.layers import TrainedLayer
from moekit.training.window import Window

# Shown a layer, the indices [T, K] that its tokens chose, and the mask [T] of those that are no padding.
Count = Callable[[TrainedLayer, Tensor, Tensor | None], None]
# Told of a layer whose choices cannot be read after all, and why.
Failed = Callable[[int, MoekitError], None]


class ChoiceWatch:
    """Shows what is chosen in each training forward, once; a layer whose choices cannot be read falls out.

    Args:
        window: the model's forwards.
        layers: whose choices are told (`moekit.training.observed`).
        count: shown them.
        failed: told of a layer that falls out.
    """

    def __init__(self, window: Window, layers: Sequence[TrainedLayer], count: Count, failed: Failed) -> None:
        self._window, self._count, self._failed = window, count, failed
        self._handles = {
            layer.index: see_choices(layer.layer, partial(self._seen, layer), otherwise=partial(self._drop, layer))
            for layer in layers
        }

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _drop(self, layer: TrainedLayer, error: MoekitError) -> None:
        handle = self._handles.pop(layer.index, None)
        if handle is not None:
            handle.remove()
            self._failed(layer.index, error)

    @torch.no_grad()
    def _seen(self, layer: TrainedLayer, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        window = self._window
        if not window.inside or not window.trains(layer.layer.experts):
            return
        try:
            mask_T = window.mask(len(index_TK), layer.index)
        except MoekitError as error:
            self._drop(layer, error)
            return
        self._count(layer, index_TK, None if mask_T is None else mask_T.to(index_TK.device))
