"""A forward pass of a model that stops before every decoder layer.

The model's own forward runs in a greenlet, a stack of its own within the thread. A stand-in at each decoder layer's
place stops it there, with the arguments that the layer was to be called with. Whoever drives it runs the layer with
these arguments, as often as needed, and hands an answer on; the forward goes on, by the model's own code, to the next
layer.
Nothing needs to be known about what layers take, give or share.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from moekit.streaming.inside import Inside
from moekit.streaming.nested import mapped, mapped_arguments, tensors_in
from moekit.streaming.spill import bytes_of

# Outputs that a config may ask a model to collect from its layers on the way: nobody reads them here.
_COLLECTED = ("output_router_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True, eq=False)
class Call:
    """A layer that is about to be called: its index, and the arguments."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states among the arguments: what is called so, or the first tensor."""
        return self._values()[self._key()]  # type: ignore[no-any-return]

    def with_hidden(self, hidden: Tensor) -> Call:
        """The same call with other hidden states."""
        key = self._key()
        if isinstance(key, int):
            args = (*self.args[:key], hidden, *self.args[key + 1 :])
            return Call(self.index, args, self.kwargs)
        return Call(self.index, self.args, {**self.kwargs, key: hidden})

    def copied(self) -> tuple[Call, list[tuple[Tensor, Tensor]]]:
        """The same call on copies of its tensors, in memory as they were: one storage stays one.

        Returns:
            The call, and each copy with what it is a copy of.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        storages: dict[int, torch.UntypedStorage] = {}

        def copy(tensor: Tensor) -> Tensor:
            own = tensor.untyped_storage()
            if own.data_ptr() not in storages:
                storages[own.data_ptr()] = bytes_of(own).clone().untyped_storage()
            made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            made.set_(storages[own.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())
            pairs.append((made, tensor))
            return made

        args, kwargs = mapped_arguments(self.args, self.kwargs, copy)
        return Call(self.index, args, kwargs), pairs

    def _values(self) -> dict[int | str, Any]:
        return dict([*enumerate(self.args), *self.kwargs.items()])

    def _key(self) -> int | str:
        if isinstance(self.kwargs.get("hidden_states"), Tensor):
            return "hidden_states"
        return next(key for key, value in self._values().items() if isinstance(value, Tensor))


@dataclass(frozen=True, eq=False)
class _Run:
    """Asks a paused pass to call this with the arguments of a call, and to stay where it is."""

    module: Callable[..., Any]
    call: Call


@dataclass(frozen=True, eq=False)
class _Answer:
    """Tells a paused pass to go on with this as the layer's answer."""

    value: Any


@dataclass(frozen=True, eq=False)
class _Failed:
    error: BaseException


class StandIns:
    """What stands at the places of a model's decoder layers while its forward runs.

    Args:
        model: the whole model.
        layers: its decoder layers, in the order of their indices.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        own = {id(layer): index for index, layer in enumerate(layers)}
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None and id(child) in own:
                    self._places.append((parent, name, _StandIn(child, own[id(child)], self)))
        # What answers where no paused pass runs: index, arguments -> answer.
        self._otherwise: Callable[[Call], Any] | None = None

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """What stands there is in its place again afterwards: the layer, or what somebody has put there."""
        before = [parent._modules[name] for parent, name, _ in self._places]
        for parent, name, stand_in in self._places:
            parent._modules[name] = stand_in
        try:
            yield
        finally:
            for (parent, name, _), module in zip(self._places, before, strict=True):
                parent._modules[name] = module

    @contextlib.contextmanager
    def answering(self, answer: Callable[[Call], Any]) -> Iterator[None]:
        """No pass is paused while this lasts: each layer's answer is what this function gives."""
        before, self._otherwise = self._otherwise, answer
        try:
            with self.standing():
                yield
        finally:
            self._otherwise = before

    def reached(self, call: Call) -> Any:
        """A layer is called."""
        current = getcurrent()
        if isinstance(current, _Flow):
            return current.wait(call)
        if self._otherwise is None:
            raise RuntimeError("a decoder layer's stand-in is called outside of a paused pass")
        return self._otherwise(call)


class _StandIn(nn.Module):
    """Stands where a decoder layer stood: answers for its attributes, and for its call."""

    def __init__(self, layer: nn.Module, index: int, stand_ins: StandIns) -> None:
        super().__init__()
        self.__dict__["_stood_for"] = (layer, index, stand_ins)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stood_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _, index, stand_ins = self.__dict__["_stood_for"]
        return stand_ins.reached(Call(index, args, kwargs))


class _Flow(greenlet):  # type: ignore[misc]
    """The stack on which a forward runs."""

    def wait(self, call: Call) -> Any:
        """Stop before a layer until an answer comes."""
        parcel: list[Any] = [call]
        while True:
            # Nothing that was sent is kept here: it would be the pass's own, and never be free while it waits.
            order = self.parent.switch(parcel.pop())
            if isinstance(order, _Answer):
                return order.value
            parcel.append(_called(order))
            order = None


def _called(order: _Run) -> Any:
    try:
        # New tensors over the same storage: what a hook keeps of them stays whole when a pass's own are emptied.
        args, kwargs = mapped_arguments(order.call.args, order.call.kwargs, Tensor.detach)
        return mapped(order.module(*args, **kwargs), Tensor.detach)
    except GreenletExit:
        raise
    except BaseException as error:
        return _Failed(error)


class PausedPass:
    """One forward pass, which stops before each decoder layer.

    Args:
        forward: runs the model's forward; called once.
        stand_ins: of the model's layers.
        device: where it runs.

    Attributes:
        call: the layer that it waits at; None before it has begun, and when the forward has ended.
        result: what the forward gave, when it has ended.
    """

    def __init__(self, forward: Callable[[], Any], stand_ins: StandIns, device: torch.device) -> None:
        self.call: Call | None = None
        self.result: Any = None
        self._stand_ins = stand_ins
        self._inside = Inside(device)
        self._flow: _Flow | None = _Flow(forward)
        self._flow.gr_context = contextvars.copy_context()

    def begin(self) -> None:
        """Go up to the first layer."""
        self._arrive(self._switch(None, standing=True))

    def run(self, module: Callable[..., Any], call: Call | None = None) -> Any:
        """What a layer answers to the call that waits, or to another one; the pass stays where it is.

        Raises:
            BaseException: what the layer raises; the pass can be asked again.
        """
        assert self.call is not None
        made = self._switch(_Run(module, call or self.call), standing=False)
        if isinstance(made, _Failed):
            raise made.error
        return made

    def go_on(self, answer: Any) -> None:
        """Hand an answer on, and go up to the next layer, or to the end."""
        self.call = None
        self._arrive(self._switch(_Answer(answer), standing=True))

    def held(self) -> list[Tensor]:
        """Tensors that the stopped forward holds."""
        roots: list[Any] = [] if self.call is None else [self.call.args, self.call.kwargs]
        frame = None if self._flow is None else self._flow.gr_frame
        while frame is not None:
            if frame.f_code.co_flags & 1:  # a function's: others have their names in a dictionary that is in use
                local = frame.f_locals
                roots.extend(local.values())
                if type(local) is dict:  # a copy, which up to Python 3.12 the frame keeps, and with it old tensors
                    local.clear()
            frame = frame.f_back
        return tensors_in(roots)

    def close(self) -> None:
        """End the forward where it stands; what it holds is free."""
        flow, self._flow, self.call, self.result = self._flow, None, None, None
        if flow is not None and flow and not flow.dead:
            flow.parent = getcurrent()
            with self._inside.entered():
                flow.throw(GreenletExit)

    def _switch(self, order: Any, *, standing: bool) -> Any:
        flow = self._flow
        assert flow is not None
        flow.parent = getcurrent()
        places = self._stand_ins.standing() if standing else contextlib.nullcontext()
        with self._inside.entered(), places:
            return flow.switch() if order is None else flow.switch(order)

    def _arrive(self, came: Any) -> None:
        flow = self._flow
        if flow is None or flow.dead:
            self.result, self._flow = came, None
            return
        self.call = came


@contextlib.contextmanager
def nothing_collected(model: nn.Module) -> Iterator[None]:
    """The model's configs ask for nothing but its output while a pass begins; they are asked in the beginning only."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    asked = [(c, name) for c in configs.values() for name in _COLLECTED if getattr(c, name, False) is True]
    for config, name in asked:
        setattr(config, name, False)
    try:
        yield
    finally:
        for config, name in asked:
            setattr(config, name, True)
