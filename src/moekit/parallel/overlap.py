"""Compute shared experts while rows travel, in whichever order a family's block calls them.

Some blocks call router, experts, shared experts: there the experts' stand-in computes the shared ones early and keeps
the result until the block asks. Others call the shared experts first: there that call routes and dispatches first, and
router and experts find their work begun. Either way the block computes the same numbers from the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy import MoELayer
from moekit.errors import UnsupportedModel
from moekit.parallel.dispatcher import Dispatcher
from moekit.parallel.empty_batch import EmptyBatch
from moekit.runtime.forwards import ForwardAbove
from moekit.runtime.slots import parts_on

_Forward = Callable[..., Any]


def _own(module: nn.Module) -> _Forward:
    """A module's forward as its class defines it now: a routing policy may come and go meanwhile."""
    return partial(type(module).forward, module)


class _Wrapped(ForwardAbove):
    """A forward in place of a module's own; a copy of the module has its own again."""

    def __init__(self, forward: _Forward, module: nn.Module) -> None:
        self._forward, self._module = forward, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _own(memo[id(self._module)])


def _key(tensor: Tensor) -> tuple[int, int, int]:
    """What names a tensor's contents however it is viewed: where it lies, how much, and how often it was written."""
    return tensor.data_ptr(), tensor.numel(), 0 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class _Flight:
    """Tokens dispatched early, and the choices they left with."""

    key: tuple[int, int, int]
    flight: Any
    indices_NK: Tensor
    weights_NK: Tensor

    def left_with(self, indices_NK: Tensor, weights_NK: Tensor) -> bool:
        """Whether these are still the choices, whatever a hook hung on them."""
        same = torch.equal(weights_NK.detach(), self.weights_NK.detach().reshape(weights_NK.shape))
        return same and torch.equal(indices_NK, self.indices_NK.reshape(indices_NK.shape))


@dataclass(eq=False)
class SharedOverlap:
    """What one layer has under way.

    While parts of a record are attached to the experts, what the router chose need not be what leaves: nothing is done
    early then.

    Attributes:
        layer: its router is called early where the block begins with the shared experts.
        dispatcher: of the layer.
        empty: whether the pass under way stands for a batch of no rows.
    """

    layer: MoELayer
    dispatcher: Dispatcher
    empty: EmptyBatch
    _results: dict[tuple[int, tuple[int, int, int]], Tensor] = field(default_factory=dict)
    _routed: tuple[tuple[int, int, int], Any] | None = None
    _flight: _Flight | None = None
    _begins_early: bool = True

    @property
    def shared(self) -> tuple[nn.Module, ...]:
        """The shared experts."""
        return self.layer.shared

    @property
    def router(self) -> nn.Module:
        """The layer's router."""
        return self.layer.require_router()

    def install(self) -> None:
        """Wrap the forwards of router and shared experts."""
        for number, module in enumerate(self.shared):
            module.forward = _Wrapped(self._shared_forward(number), module)
        self.router.forward = _Wrapped(self._router_forward, self.router)

    def remove(self) -> None:
        """Give them their own forwards back."""
        for module in (*self.shared, self.router):
            module.__dict__.pop("forward", None)

    def take(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> tuple[Any, Tensor | None]:
        """What was dispatched early for these tokens, and a zero that ties the block's weights to the result.

        Hooks on a router may hang losses on the weights it returns; what was dispatched early are the weights before.

        Returns:
            Nothing if nothing was dispatched early.

        Raises:
            UnsupportedModel: a hook changed the choices or the values of their weights meanwhile.
        """
        found, self._flight = self._flight, None
        if found is None:
            return None, None
        if found.key != _key(x_NH):
            # The block gives its experts something else than its shared ones: never begin early again.
            self._begins_early = False
            return None, None
        if not found.left_with(indices_NK, weights_NK):
            raise UnsupportedModel(
                "a hook changes what the router chose or its weights, but tokens have left with the old ones",
                hint="take the hook off, or run without --ep; in Python call expert_parallel(..., overlap=False)",
            )
        return found.flight, None if weights_NK is found.weights_NK else (weights_NK * 0).sum()

    def compute_shared(self, hidden: Tensor) -> None:
        """Run the shared experts now, for when the block asks."""
        if parts_on(self.layer.experts):
            return
        for number in range(len(self.shared)):
            self._results[number, _key(hidden)] = _own(self.shared[number])(hidden)

    def _shared_forward(self, number: int) -> _Forward:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            ready = self._results.pop((number, _key(hidden)), None)
            if ready is not None:
                return ready.view(*hidden.shape[:-1], ready.shape[-1])
            early = self._begins_early and not parts_on(self.layer.experts)
            if number == 0 and early:  # what an earlier pass has left is forgotten
                self._begin(hidden)
            return _own(self.shared[number])(hidden, *args, **kwargs)

        return forward

    def _begin(self, hidden: Tensor) -> None:
        """Route and dispatch before the shared experts are computed."""
        x_NH = hidden.reshape(-1, hidden.shape[-1])
        answer = _own(self.router)(x_NH)
        self._routed = (_key(x_NH), answer)
        _, weights_NK, indices_NK = answer
        choices = self.empty.choices(indices_NK, weights_NK, self.layer.geometry.experts)
        flight = self.dispatcher.dispatch(x_NH, *choices)
        self._flight = _Flight(_key(x_NH), flight, indices_NK, weights_NK)

    def _router_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        found, self._routed = self._routed, None
        if found is not None and found[0] == _key(hidden):
            return found[1]
        return _own(self.router)(hidden, *args, **kwargs)


def overlap_shared(layer: MoELayer, dispatcher: Dispatcher, empty: EmptyBatch) -> SharedOverlap | None:
    """Install the overlap on a layer with shared experts; None where its router does not answer hidden states alone."""
    if layer.router is None or layer.passed:
        return None
    overlap = SharedOverlap(layer, dispatcher, empty)
    overlap.install()
    return overlap
