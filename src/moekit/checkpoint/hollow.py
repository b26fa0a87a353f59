"""Weights that a model does not hold because a part computes them: they keep shape and place, and take no memory.

Every element of such a parameter is one NaN in memory: what reads it by mistake answers NaN, which is refused wherever
weights or outputs are looked at, and never a number that looks right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor is one element in memory that stands at every place."""
    return tensor.numel() > 1 and not any(tensor.stride())


def hollow_out(model: nn.Module, names: Collection[str], dtype: torch.dtype | None = None) -> None:
    """Let parameters of a model take no memory.

    Args:
        model: may lie on the meta device.
        names: of parameters.
        dtype: that they are said to have; None for their own.
    """
    for name in names:
        like = model.get_parameter(name)
        _replace(model, name, like.shape, dtype or like.dtype)


def move(model: nn.Module, device: str | torch.device) -> None:
    """Bring a model to a device, such parameters without the memory that a copy of each would take."""
    hollow = {name: (value.shape, value.dtype) for name, value in model.named_parameters() if is_hollow(value)}
    for name in hollow:
        value = model.get_parameter(name)
        value.data = value.data[(0,) * value.dim()]
    model.to(device)
    for name, (shape, dtype) in hollow.items():
        _replace(model, name, shape, dtype, device)


def _replace(
    model: nn.Module, name: str, shape: torch.Size, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> None:
    import torch
    from torch import nn

    path, _, last = name.rpartition(".")
    empty = torch.full((1,) * len(shape), torch.nan, dtype=dtype, device=device).expand(shape)
    setattr(model.get_submodule(path), last, nn.Parameter(empty, requires_grad=False))


def hollow_names(model: nn.Module) -> set[str]:
    """Names of a model's parameters that take no memory."""
    return {name for name, value in model.named_parameters() if is_hollow(value)}


@contextlib.contextmanager
def without_hollow(model: PreTrainedModel) -> Iterator[None]:
    """Keep such parameters out of what `save_pretrained` writes, as long as the block lasts."""
    before: Any = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = {*(before or ()), *hollow_names(model)}
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = before
