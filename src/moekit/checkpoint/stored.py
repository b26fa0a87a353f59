"""A model that is wider in memory than on disk: computed in float32, written as it was stored.

float32 holds every bfloat16 and float16 exactly, so weights that nothing changed are written back bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.hollow import is_hollow

if TYPE_CHECKING:
    import torch
    from torch import nn

# Attribute of a live model that says how it lies on disk, beside the one that says where it came from.
_MARK = "moekit_stored"


@dataclass(frozen=True)
class Stored:
    """How the weights of a model that was loaded wider lie on disk.

    Attributes:
        dtype: of the weights.
        wide: names of those that are stored in float32 all the same.
    """

    dtype: torch.dtype
    wide: frozenset[str]


def mark_stored(model: nn.Module, stored: Stored | None) -> None:
    """Note on a model how its weights lie on disk; None forgets it: they are written as they are in memory."""
    object.__setattr__(model, _MARK, stored)


def marked_stored(model: nn.Module) -> Stored | None:
    """What `mark_stored` noted."""
    found: Stored | None = getattr(model, _MARK, None)
    return found


def saved_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they would be written, tied ones once."""
    stored, narrow = marked_stored(model), {id(t) for t in _widened(model)}
    size = {
        id(t): t.numel() * (stored.dtype.itemsize if stored is not None and id(t) in narrow else t.element_size())
        for t in (*model.parameters(), *model.buffers())
        if not is_hollow(t)
    }
    return sum(size.values())


@contextlib.contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Let a model's weights be of the type of its checkpoint for as long as the block lasts."""
    stored = marked_stored(model)
    if stored is None:
        yield
        return
    before = [(tensor, tensor.data) for tensor in _widened(model)]
    config: Any = getattr(model, "config", None)
    named = getattr(config, "dtype", None)
    try:
        for tensor, data in before:
            tensor.data = data.to(stored.dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
        if config is not None:
            config.dtype = named  # saving names the type it writes there


def round_as_stored(model: nn.Module) -> None:
    """Give a model's weights, wide as they stay, the values that they would be read with once they are written."""
    stored = marked_stored(model)
    for tensor in _widened(model):
        assert stored is not None
        tensor.data = tensor.data.to(stored.dtype).to(tensor.dtype)


def _widened(model: nn.Module) -> list[torch.Tensor]:
    """Weights that were stored narrower, tied ones once; none of a model that has since been given another type."""
    stored = marked_stored(model)
    if stored is None:
        return []
    import torch

    held = model.state_dict(keep_vars=True).items()
    found = {id(t): t for name, t in held if t.dtype == torch.float32 and name not in stored.wide}
    return list(found.values())
