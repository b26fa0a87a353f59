"""A typed door to autograd functions: `Function.apply` carries no types of its own."""

from __future__ import annotations

from typing import Any

from torch.autograd import Function


def apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]
