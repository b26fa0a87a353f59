"""The state of a thread that torch keeps, when two flows of control take turns in it.

Grad mode, autocast and the stacks of modes belong to the thread, not to the code that entered them: a forward pass that
is paused within `torch.autocast` would leave it on for whoever runs meanwhile, and would find on its return what others
have left. So what a pass has changed is taken off when it pauses, and put on again when it goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import (
    _get_current_function_mode_stack,
    _pop_mode as _pop_function_mode,
    _push_mode as _push_function_mode,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

# Device -> whether autocast is on, and to which type.
_Autocast = dict[str, tuple[bool, torch.dtype]]


@dataclass
class _State:
    grad: bool
    inference: bool
    autocast: _Autocast
    dispatch: list[Any]
    function: list[Any]


def _now(devices: tuple[str, ...]) -> _State:
    return _State(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices},
        list(_get_current_dispatch_mode_stack()),
        list(_get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
    )


class Inside:
    """What a paused pass has changed of its thread.

    Args:
        device: where it runs, beside the processor.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = tuple(dict.fromkeys(("cpu", device.type)))
        self._grad = self._inference = False
        self._autocast: _Autocast = {}
        self._dispatch: list[Any] = []
        self._function: list[Any] = []

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The pass goes on in here: its own state on top of the caller's, without gradients unless it asks for them."""
        # Tensors of inference mode could not be given new storage outside of it.
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            outer = _now(self._devices)
            _set_autocast(self._autocast)
            _put(_push_mode, self._dispatch)
            _put(_push_function_mode, self._function)
            try:
                yield
            finally:
                inner = _now(self._devices)
                self._grad, self._inference = inner.grad, inner.inference
                self._autocast = {d: own for d, own in inner.autocast.items() if own != outer.autocast[d]}
                self._dispatch = _take(_pop_mode, inner.dispatch, outer.dispatch)
                self._function = _take(_pop_function_mode, inner.function, outer.function)
                _set_autocast(outer.autocast)


def _set_autocast(states: _Autocast) -> None:
    for device, (enabled, dtype) in states.items():
        if (enabled, dtype) != (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _put(push: Any, modes: list[Any]) -> None:
    for mode in modes:
        push(mode)


def _take(pop: Any, inner: list[Any], outer: list[Any]) -> list[Any]:
    """Take off the modes above the caller's own; lowest first."""
    return [pop() for _ in inner[len(outer) :]][::-1]
