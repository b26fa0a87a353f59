"""Walk all batches through a model layer by layer.

A decoder layer needs more than hidden states: masks, positions, rotary embeddings, which families make in their own
ways. So the model's own forward is run for every layer, with all layers before it passing their input on, the layer
itself fed from the states of the layer below, and nothing after it.

Legend: B rows, S positions, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, iterate_moe_layers
from moekit.errors import UnsupportedModel
from moekit.streaming.loader import LayerLoader
from moekit.streaming.states import MEMORY_BYTES, States


@dataclass(frozen=True, eq=False)
class Inputs:
    """One batch: token ids [B, S], and 1 where a token is, 0 at padding [B, S]."""

    input_ids: Tensor
    attention_mask: Tensor


class _Reached(Exception):
    """The layer asked for has run; what comes after it is not wanted."""


class Walk:
    """All batches of a text on their way through a model.

    Args:
        loader: of the model's layers.
        batches: what to walk.
        folder: where states are kept; None for memory, up to `limit` bytes.
        limit: bytes of states kept in memory.
    """

    def __init__(
        self,
        loader: LayerLoader,
        batches: Sequence[Inputs],
        *,
        folder: Path | None = None,
        limit: int = MEMORY_BYTES,
    ) -> None:
        self.loader = loader
        self.batches = list(batches)
        self.hidden = int(loader.model.get_input_embeddings().weight.shape[1])
        self._folder = folder
        self._limit = limit
        self._answers_tuple = False

    def new_states(self, name: str) -> States:
        """Room for the states of all batches."""
        shapes = [(batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in self.batches]
        return States(shapes, self.hidden, self.loader.dtype, folder=self._folder, name=name, limit=self._limit)

    @torch.no_grad()
    def embed(self, states: States) -> None:
        """Put into `states` what the first decoder layer sees; embedding and head must be loaded."""
        for number, batch in enumerate(self.batches):
            states.put(number, self._drive(0, batch, None, None))

    @torch.no_grad()
    def run(self, index: int, number: int, hidden_BSH: Tensor) -> Tensor:
        """Output of the decoder layer `index`, which must be loaded, on the states of a batch: [B, S, H]."""
        layer = self.loader.layer(index)
        return self._drive(index, self.batches[number], layer, hidden_BSH.to(self.loader.device))

    def _drive(self, index: int, batch: Inputs, layer: nn.Module | None, hidden_BSH: Tensor | None) -> Tensor:
        answers: list[Tensor] = []

        def reached(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if layer is None or hidden_BSH is None:
                answers.append(given)
            else:
                made = layer(hidden_BSH, *args, **kwargs)
                self._answers_tuple = isinstance(made, tuple)
                answers.append(made[0] if isinstance(made, tuple) else made)
            raise _Reached

        with self._patched(index, reached):
            inputs: dict[str, Any] = {"attention_mask": batch.attention_mask.to(self.loader.device), "use_cache": False}
            if layer is None:
                inputs["input_ids"] = batch.input_ids.to(self.loader.device)
            else:
                # Only its shape matters: the layer is fed from the states.
                rows, length = batch.input_ids.shape
                inputs["inputs_embeds"] = torch.zeros((), dtype=self.loader.dtype, device=self.loader.device).expand(
                    rows, length, self.hidden
                )
            with contextlib.suppress(_Reached):
                self.loader.decoder(**inputs)
        if not answers:
            raise UnsupportedModel(
                f"{type(self.loader.decoder).__name__} did not come to this layer",
                layer=index,
                hint="the model skips layers, or does not run them in order: run it whole",
            )
        return answers[0]

    @contextlib.contextmanager
    def _patched(self, index: int, reached: Callable[..., Tensor]) -> Iterator[None]:
        """Layers before `index` pass their input on; the one at `index` is replaced by a stand-in that calls it."""
        layers = self.loader.stack
        own = layers[index]

        def pass_on(given: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            return (given,) if self._answers_tuple else given

        layers[index] = _StandIn(own, reached)
        for layer in list(layers)[:index]:
            layer.forward = pass_on
        try:
            yield
        finally:
            layers[index] = own
            for layer in list(layers)[:index]:
                layer.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def finished_with(self, hidden_BSH: Callable[[], Tensor]) -> Iterator[None]:
        """The whole model with every decoder layer passing on these states: for final norm, head and logits.

        Args:
            hidden_BSH: gives the last layer's output for the rows that the model is about to be asked about.
        """
        layers = self.loader.stack

        def give(given: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            states = hidden_BSH().to(given.device)
            return (states,) if self._answers_tuple else states

        def pass_on(given: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            return (given,) if self._answers_tuple else given

        for number, layer in enumerate(layers):
            layer.forward = pass_on if number else give
        try:
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def moe(self, index: int) -> MoELayer | None:
        """The MoE block of a loaded decoder layer; None if the layer is dense."""
        return find_in_layer(self.loader, index)


def find_in_layer(loader: LayerLoader, index: int) -> MoELayer | None:
    """The MoE block of a loaded decoder layer, as it stands in the whole model; None if the layer is dense."""
    layer = loader.layer(index)
    prefix = next(name for name, module in loader.model.named_modules() if module is layer)
    for found in iterate_moe_layers(layer):
        return replace(
            found,
            index=index,
            name=f"{prefix}.{found.name}".rstrip("."),
            router_name=f"{prefix}.{found.router_name}" if found.router_name else "",
            experts_name=f"{prefix}.{found.experts_name}",
        )
    return None


def layer_of(loader: LayerLoader, index: int) -> MoELayer:
    """Like `find_in_layer`, for a layer that must be one.

    Raises:
        UnsupportedModel: the layer is dense.
    """
    found = find_in_layer(loader, index)
    if found is None:
        raise UnsupportedModel("this decoder layer holds no routed experts", layer=index)
    return found


class _StandIn(nn.Module):
    """Stands where a decoder layer stood: answers for its attributes, and calls a function instead."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.__dict__["_call"] = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call: Callable[..., Tensor] = self.__dict__["_call"]
        return call(*args, **kwargs)
