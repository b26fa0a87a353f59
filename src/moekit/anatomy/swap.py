"""Put another module in a block's place: for a while, or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def replace(model: nn.Module, name: str, block: nn.Module) -> nn.Module:
    """Put a module where another one stands.

    Args:
        model: the root that `name` starts from.
        name: module path of what is replaced, such as `MoELayer.name`.
        block: what comes in its place.

    Returns:
        What stood there.
    """
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    before = model.get_submodule(name)
    setattr(parent, last, block)
    return before


@contextlib.contextmanager
def replaced(model: nn.Module, name: str, block: nn.Module | None) -> Iterator[None]:
    """Put a module where another one stands while this lasts; None changes nothing.

    Args:
        model: the root that `name` starts from.
        name: module path of what is replaced, such as `MoELayer.name`.
        block: what comes in its place.
    """
    if block is None:
        yield
        return
    before = replace(model, name, block)
    try:
        yield
    finally:
        replace(model, name, before)
