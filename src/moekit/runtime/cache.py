"""What parts keep of earlier positions while tokens are generated: it lives and dies with the key-value cache.

Legend: B sequences, S new positions, L positions so far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from moekit.errors import UnsupportedModel

# What a key-value cache does to its sequences, and the same done to a tensor whose first axis is B.
_Change = Callable[..., Callable[[Tensor], Tensor]]
_ROW_CHANGES: dict[str, _Change] = {
    "reorder_cache": lambda beam_idx: lambda x: x.index_select(0, beam_idx.to(x.device)),
    "batch_select_indices": lambda indices: lambda x: x[indices.to(x.device)],
    "batch_repeat_interleave": lambda repeats: lambda x: x.repeat_interleave(repeats, dim=0),
}


class PartCache:
    """Tensors by layer and name, one row a sequence; follows its key-value cache through beam search and cropping."""

    def __init__(self) -> None:
        self._grown: dict[tuple[int, str], Tensor] = {}
        self._state: dict[tuple[int, str], Tensor] = {}
        self._reached: dict[tuple[int, str], int] = {}

    def extend(self, layer: int, name: str, values: Tensor, past: int) -> Tensor:
        """Append values of new positions [B, S, ...] to those of `past` earlier ones; all of them [B, L, ...]."""
        known = self._grown.get((layer, name))
        seen = 0 if known is None else known.shape[1]
        if seen < past:
            raise UnsupportedModel(
                f"{past} earlier positions were computed, of which {name!r} saw {seen}",
                layer=layer,
                hint="let one model, with its parts attached, fill the key-value cache from the first position",
            )
        values = values.detach()
        whole = values if known is None else torch.cat([known[:, :past].to(values.device), values], dim=1)
        self._grown[layer, name] = whole
        return whole

    def write(self, layer: int, name: str, value: Tensor, reached: int) -> None:
        """Keep a state of each sequence [B, ...] after `reached` positions, in place of the one before."""
        self._state[layer, name] = value.detach()
        self._reached[layer, name] = reached

    def read(self, layer: int, name: str, past: int) -> Tensor | None:
        """The state that was kept; None before the first position.

        Raises:
            UnsupportedModel: the key-value cache was cut back since: a state cannot go back with it.
        """
        if past == 0:
            return None
        reached = self._reached.get((layer, name), 0)
        if past != reached:
            raise UnsupportedModel(
                f"the key-value cache holds {past} positions, but {name!r} was kept after {reached}",
                layer=layer,
                hint="generate without assisted decoding, and with the parts attached from the first position",
            )
        return self._state[layer, name]

    def follow(self, cache: Any) -> None:
        """Do to these tensors what is done to the sequences of a key-value cache from now on."""
        for name, change in _ROW_CHANGES.items():
            method = getattr(cache, name, None)
            if method is not None:
                setattr(cache, name, self._with(method, change))

    def _with(
        self, method: Callable[..., Any], change: Callable[..., Callable[[Tensor], Tensor]]
    ) -> Callable[..., Any]:
        @wraps(method)
        def changed(*args: Any, **kwargs: Any) -> Any:
            move = change(*args, **kwargs)
            for kept in (self._grown, self._state):
                for key, tensor in kept.items():
                    kept[key] = move(tensor)
            return method(*args, **kwargs)

        return changed
