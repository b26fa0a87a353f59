"""Tensors in what is handed to and from a layer: tuples, dictionaries, and whatever holds them."""

from __future__ import annotations

import enum
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Objects of these libraries are looked into; others hold no states of a pass.
_LOOKED_INTO = frozenset({"transformers", "transformers_modules", "torch"})


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value with each tensor in its tuples, lists and plain dictionaries changed; all else is handed through."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def mapped_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with each tensor changed, but for those in lists and dictionaries: a layer may write into these."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return tuple(of(item) for item in value) if type(value) is tuple else value

    return tuple(of(value) for value in args), {key: of(value) for key, value in kwargs.items()}


def tensors_in(roots: Iterable[Any]) -> list[Tensor]:
    """All tensors that can be reached without going through a module, each once; weights and empty ones left out."""
    found: list[Tensor] = []
    seen: set[int] = set()
    stack = list(roots)
    kinds = _KINDS
    while stack:
        value = stack.pop()
        kind = kinds.get(type(value)) or _kind_of(type(value))
        if kind is _Kind.NOTHING or id(value) in seen:
            continue
        seen.add(id(value))
        if kind is _Kind.TENSOR:
            if not value.is_meta and value.layout == torch.strided:
                found.append(value)
        elif kind is _Kind.SEQUENCE:
            stack.extend(value)
        elif kind is _Kind.CELLS:
            stack.extend(cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        else:
            if kind is _Kind.MAPPING:
                stack.extend(value.values())
            stack.extend(getattr(value, "__dict__", {}).values())
    return found


class _Kind(enum.Enum):
    """Where tensors may be in an object."""

    NOTHING = enum.auto()
    TENSOR = enum.auto()
    SEQUENCE = enum.auto()
    MAPPING = enum.auto()
    ATTRIBUTES = enum.auto()
    CELLS = enum.auto()


# Type -> where tensors may be in its objects; a pass is looked through at every layer.
_KINDS: dict[type, _Kind] = {}


def _kind_of(kind: type) -> _Kind:
    if issubclass(kind, Tensor):
        found = _Kind.NOTHING if issubclass(kind, nn.Parameter) else _Kind.TENSOR
    elif issubclass(kind, dict):
        found = _Kind.MAPPING
    elif issubclass(kind, (tuple, list, set, frozenset, deque)) and kind is not torch.Size:
        found = _Kind.SEQUENCE
    elif kind is types.FunctionType:
        found = _Kind.CELLS  # a mask may be a function that holds tensors
    elif issubclass(kind, (nn.Module, type)) or kind.__name__.endswith("Config"):
        found = _Kind.NOTHING
    else:
        known = kind.__module__.partition(".")[0] in _LOOKED_INTO and hasattr(kind, "__dict__")
        found = _Kind.ATTRIBUTES if known else _Kind.NOTHING
    _KINDS[kind] = found
    return found


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
