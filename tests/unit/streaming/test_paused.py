"""A paused forward keeps its own state of the thread, and the rest of the program keeps its own."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from moekit.errors import UnsupportedModel
from moekit.streaming.paused import PausedPass, StandIns
from moekit.streaming.walk import Inputs, Walk

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")


class Layer(nn.Module):
    """Tells what state it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.saw: list[Any] = []

    def forward(self, hidden: Tensor, state: Callable[[], Any] = lambda: None) -> Tensor:
        self.saw.append(state())
        made: Tensor = self.linear(hidden)
        return made


class Model(nn.Module):
    """Runs its layers in this order, within some context."""

    def __init__(
        self, order: tuple[int, ...] = (0, 1), context: Any = contextlib.nullcontext, state: Any = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.embedding = nn.Embedding(8, 4)
        self.order, self.context, self.state = order, context, state or (lambda: None)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = self.embedding(input_ids)
        with self.context():
            for index in self.order:
                hidden = self.layers[index](hidden, self.state)
        return hidden.float()


class Counting(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Named(TorchFunctionMode):
    """Counts calls."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def set_variable() -> Any:
    token = VARIABLE.set("inside")
    try:
        yield
    finally:
        VARIABLE.reset(token)


def autocast_state() -> Any:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


CONTEXTS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), autocast_state),
    "gradients": (torch.enable_grad, torch.is_grad_enabled),
    "inference": (torch.inference_mode, torch.is_inference_mode_enabled),
    "variable": (set_variable, VARIABLE.get),
    "dispatch mode": (Counting, lambda: len(_get_current_dispatch_mode_stack())),
    "function mode": (Named, torch._C._len_torch_function_stack),
}


@pytest.mark.parametrize("name", sorted(CONTEXTS))
def test_what_a_forward_enters_is_its_own(name: str) -> None:
    context, state = CONTEXTS[name]
    model = Model(context=context, state=state)
    ids = torch.arange(4)[None]
    with torch.no_grad():
        expected = model(ids)
    inside = model.layers[0].saw.pop()
    for layer in model.layers:
        layer.saw.clear()
    stand_ins = StandIns(model, list(model.layers))
    passes = [PausedPass(lambda: model(ids), stand_ins, torch.device("cpu")) for _ in range(3)]
    with torch.no_grad():
        before = state()
        assert before != inside
        for paused in passes:
            paused.begin()
            assert state() == before
        for index in (0, 1):
            # In turns, and not in the order in which they have begun.
            for paused in [passes[1], passes[0], passes[2]]:
                answer = paused.run(model.layers[index])
                assert state() == before
                paused.go_on(answer)
                assert state() == before
    assert model.layers[0].saw == model.layers[1].saw == [inside] * 3
    assert all(torch.equal(paused.result, expected) for paused in passes)


def test_a_mode_of_the_caller_sees_what_a_paused_layer_does() -> None:
    model = Model()
    paused = PausedPass(lambda: model(torch.arange(4)[None]), StandIns(model, list(model.layers)), torch.device("cpu"))
    paused.begin()
    with Counting() as counting:
        answer = paused.run(model.layers[0])
    assert counting.count > 0
    paused.go_on(answer)
    with torch.inference_mode():
        paused.go_on(paused.run(model.layers[1]))
    assert not paused.result.is_inference()


def test_a_pass_that_is_closed_leaves_what_it_has_entered() -> None:
    left: list[str] = []

    @contextlib.contextmanager
    def context() -> Any:
        try:
            yield
        finally:
            left.append("left")

    model = Model(context=context)
    paused = PausedPass(lambda: model(torch.arange(4)[None]), StandIns(model, list(model.layers)), torch.device("cpu"))
    paused.begin()
    assert not left
    paused.close()
    paused.close()
    assert left == ["left"]


class _Loader:
    def __init__(self, model: Any) -> None:
        self.model, self.decoder, self.layers = model, model, 2
        self.device, self.dtype = torch.device("cpu"), torch.float32
        model.get_input_embeddings = lambda: model.embedding

    def layer(self, index: int) -> Any:
        return self.model.layers[index]


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ((1, 0), "comes to layer 1 where layer 0 was due"),
        ((), "comes to the end where layer 0 was due"),
        ((0, 0, 1), "comes to layer 0 where layer 1 was due"),
        ((0, 1, 0, 1), "comes to layer 0 again"),
    ],
)
def test_another_order_of_layers_is_never_taken_for_the_usual_one(order: tuple[int, ...], told: str) -> None:
    ids = torch.arange(4)[None]
    walk = Walk(_Loader(Model(order)), [Inputs(ids, torch.ones_like(ids))])  # type: ignore[arg-type]
    passes = walk.passes("states")

    def through() -> None:
        passes.begin()
        for index in range(2):
            passes.run(index, 0)
            passes.go_on(index, 0)
        passes.finish(0)

    with pytest.raises(UnsupportedModel, match=told):
        through()
    passes.close()


def test_layers_that_run_twice_are_walked_by_who_asks_where_a_pass_stands() -> None:
    model, ids = Model((0, 1, 0, 1, 1)), torch.arange(4)[None]
    with torch.no_grad():
        expected = model(ids)
    paused = PausedPass(lambda: model(ids), StandIns(model, list(model.layers)), torch.device("cpu"))
    paused.begin()
    came = []
    while paused.call is not None:
        came.append(paused.call.index)
        paused.go_on(paused.run(model.layers[paused.call.index]))
    assert came == [0, 1, 0, 1, 1]
    assert torch.equal(paused.result, expected)


class _InPlace(Layer):
    def forward(self, hidden: Tensor, state: Any = None) -> Tensor:
        hidden += self.linear(hidden)
        return hidden


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_layer_that_writes_into_what_it_is_given_can_be_run_again(limit: int) -> None:
    model = Model()
    model.layers = nn.ModuleList([_InPlace(), _InPlace()])
    given = [torch.arange(4)[None], torch.arange(3, 7)[None]]
    with torch.no_grad():
        expected = [model(ids) for ids in given]
    walk = Walk(_Loader(model), [Inputs(ids, torch.ones_like(ids)) for ids in given], limit=limit)  # type: ignore[arg-type]
    passes = walk.passes("states")
    passes.begin()
    for index in range(2):
        for number in range(2):
            for _ in range(3):
                passes.run(index, number)
            passes.go_on(index, number)
    assert all(torch.equal(passes.finish(number), wanted) for number, wanted in enumerate(expected))
    passes.close()


class _Between(Model):
    """A weight of no layer stands between its layers."""

    def __init__(self, *, loud: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.loud = loud

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = self.layers[0](self.embedding(input_ids))
        hidden = hidden * self.weight if self.loud else self.weight.expand(hidden.shape)
        made: Tensor = self.layers[1](hidden)
        return made


@pytest.mark.parametrize("loud", [True, False])
def test_weights_between_layers_that_have_left_memory_are_named(loud: bool) -> None:
    model, ids = _Between(loud=loud), torch.arange(4)[None]
    walk = Walk(_Loader(model), [Inputs(ids, torch.ones_like(ids))])  # type: ignore[arg-type]
    passes = walk.passes("states")
    passes.begin()
    passes.run(0, 0)
    model.weight = nn.Parameter(model.weight.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="uses weights between its layers"):
        passes.go_on(0, 0)
    passes.close()
