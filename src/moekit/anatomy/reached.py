"""Which of the MoE blocks of one decoder layer a text runs through: asked, by calling what holds them.

A layer may hold one block for text and another for images (ERNIE 4.5 VL). Called with hidden states alone, as of a
batch that shows nothing, the module that holds both runs one of them. A hollow copy is asked: on the meta device, with
the family's own classes, without hooks and parts, its experts replaced by functions that note that they were called.

Legend: B rows, S positions, T tokens, H hidden size.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.checkpoint.names import PARTS

# Rows and positions of the question.
_ROWS, _POSITIONS = 1, 3


def holder_of(names: Sequence[str]) -> str | None:
    """Path of the innermost module that holds all of these, if it lies within one decoder layer; None if not.

    >>> holder_of(["layers.1.mlp.text", "layers.1.mlp.vision"])
    'layers.1.mlp'
    """
    paths = [name.split(".") for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    holder = ".".join(shared)
    numbered = any(re.search(r"\.\d+\.", name) for name in names)
    within = bool(re.search(r"\.\d+\.", f"{holder}.")) if numbered else True
    return holder if holder and within else None


def reached_by_text(holder: nn.Module, experts: Mapping[str, int]) -> set[str] | None:
    """Paths of the experts that run when the holder is called with hidden states alone; None if it cannot be asked.

    Args:
        holder: holds several MoE blocks.
        experts: path below the holder -> H.
    """
    hollow = _hollow(holder)
    called: set[str] = set()
    for path in experts:
        hollow.get_submodule(path).forward = _noting(path, called)
    (hidden,) = set(experts.values())
    rows_BSH = torch.zeros(_ROWS, _POSITIONS, hidden, device="meta", dtype=_dtype(holder))
    try:
        with torch.no_grad():
            hollow(rows_BSH)
    except Exception:  # a module that wants more, or other things, can fail in as many ways as there are families
        return None
    return called


def _noting(path: str, called: set[str]) -> Callable[..., Tensor]:
    def note(hidden_TH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.add(path)
        return torch.zeros_like(hidden_TH)

    return note


def _dtype(module: nn.Module) -> torch.dtype:
    return next((t.dtype for t in module.parameters() if t.is_floating_point()), torch.float32)


def _hollow(module: nn.Module) -> nn.Module:
    """A copy without memory, hooks and parts, of the family's own classes, in eval mode."""
    instead: dict[int, Any] = {}
    for parameter in module.parameters():
        instead[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        instead[id(buffer)] = buffer.detach().to("meta")
    for child in module.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks):
            instead[id(hooks)] = OrderedDict()
        parts = child._modules.get(PARTS)
        if parts is not None:
            instead[id(parts)] = nn.Module()
    made = copy.deepcopy(module, instead)
    for child in made.modules():
        stock = getattr(type(child), "stock_class", None)
        if stock is not None:
            child.__class__ = stock
        child.__dict__.pop("forward", None)
    return made.eval()
