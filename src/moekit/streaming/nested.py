"""Tensors in what is handed to and from a layer: tuples, dictionaries, and whatever holds them."""

from __future__ import annotations

import json
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Objects of these libraries are looked into; others hold no states of a pass.
_LOOKED_INTO = frozenset({"transformers", "transformers_modules", "torch"})
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type})


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value with each tensor in its tuples, lists and plain dictionaries changed; all else is handed through."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def tensors_in(roots: Iterable[Any]) -> list[Tensor]:
    """All tensors that can be reached without going through a module, each once; weights and empty ones left out."""
    found: list[Tensor] = []
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if type(value) in _PLAIN or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_meta and value.layout == torch.strided:
                found.append(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
            stack.extend(getattr(value, "__dict__", {}).values())
        elif isinstance(value, (tuple, list, set, frozenset, deque)):
            stack.extend(value)
        else:
            stack.extend(_parts(value))
    return found


def _parts(value: Any) -> list[Any]:
    """What an object holds, where it may hold states: a cache, a mask object, a function's cells."""
    if isinstance(value, types.FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    kind = type(value)
    own = getattr(value, "__dict__", None)
    if own is None or isinstance(value, (nn.Module, type)) or kind.__name__.endswith("Config"):
        return []
    return list(own.values()) if kind.__module__.partition(".")[0] in _LOOKED_INTO else []


def hidden_of(answer: Any) -> Tensor:
    """The hidden states in what a layer answers: the answer itself, or the first tensor in it.

    Raises:
        TypeError: it holds no tensor.
    """
    if isinstance(answer, Tensor):
        return answer
    values = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"a decoder layer answers {type(answer).__name__}, which holds no hidden states")


def with_hidden(answer: Any, hidden: Tensor) -> Any:
    """An answer with other hidden states; what else it holds stays."""
    old = hidden_of(answer)
    return mapped(answer, lambda tensor: hidden if tensor is old else tensor)


class Unstorable(TypeError):
    """An answer holds something else than tensors and plain values."""


def described(value: Any, tensors: list[Tensor]) -> Any:
    """What JSON keeps of an answer; its tensors are appended to a list.

    Raises:
        Unstorable: it holds other objects.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [described(item, tensors) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: described(item, tensors) for key, item in value.items()}}
    raise Unstorable(type(value).__name__)


def rebuilt(told: Any, tensors: list[Tensor]) -> Any:
    """The answer that was described."""
    ((kind, content),) = told.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {key: rebuilt(item, tensors) for key, item in content.items()}
    items = [rebuilt(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def same_structure(first: Any, second: Any) -> bool:
    """Whether two descriptions tell of answers that are built alike."""
    return json.dumps(first) == json.dumps(second)
