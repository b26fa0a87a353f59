"""Walk all batches through a model layer by layer.

Each batch is one forward pass of the real model, by its own code, which stops before every decoder layer until that is
loaded (`moekit.streaming.paused`). What comes before the first layer (embedding, masks, rotary tables, inputs of
layers) runs once a batch, what stands between layers runs where it stands, and whatever layers hand on, they hand on.

Legend: B rows, S positions, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, iterate_moe_layers
from moekit.data.forcing import decoder_inputs
from moekit.errors import UnsupportedModel
from moekit.streaming.loader import LayerLoader
from moekit.streaming.nested import mapped, with_hidden
from moekit.streaming.passes import Passes
from moekit.streaming.paused import Call, PausedPass, StandIns
from moekit.streaming.states import MEMORY_BYTES, States


@dataclass(frozen=True, eq=False)
class Inputs:
    """One batch: token ids [B, S], and 1 where a token is, 0 at padding [B, S].

    Attributes:
        more: makes what the model's forward is given beside these, such as the pixels of pictures; None for nothing.
    """

    input_ids: Tensor
    attention_mask: Tensor
    more: Callable[[], Mapping[str, Any]] | None = None


class Walk:
    """All batches of a text on their way through a model.

    Args:
        loader: of the model's layers.
        batches: what to walk.
        folder: where passes lie that take more than `limit`, and what a later run goes on from; None keeps nothing for
            later, and what is too much in the system's temporary folder.
        limit: bytes that passes hold in memory.
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
        self.folder = folder
        self._limit = limit
        self._stand_ins: StandIns | None = None

    @property
    def stand_ins(self) -> StandIns:
        """What stands at the places of the layers while the model's forward runs."""
        if self._stand_ins is None:
            layers = [self.loader.layer(index) for index in range(self.loader.layers)]
            self._stand_ins = StandIns(self.loader.model, layers)
        return self._stand_ins

    def passes(self, name: str, *, resumed: bool = False) -> Passes:
        """A way of all batches through the model, not begun yet.

        Args:
            name: of its files.
            resumed: keep in the walk's folder what a later run can go on from.
        """
        return Passes(self, name, resumed=resumed, limit=self._limit)

    def new_states(self, name: str) -> States:
        """Room for [B, S, H] numbers of all batches."""
        shapes = [(batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in self.batches]
        return States(shapes, self.hidden, self.loader.dtype, folder=self.folder, name=name, limit=self._limit)

    def inputs(self, number: int) -> dict[str, Any]:
        """What the model's forward is given for a batch."""
        batch = self.batches[number]
        more = {} if batch.more is None else batch.more()
        # Copies: a pass may lay down what it holds.
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        given |= {**decoder_inputs(self.loader.model, batch.input_ids, batch.attention_mask), **more}
        given = mapped(given, lambda tensor: tensor.to(self.loader.device, copy=True))
        return {**given, "use_cache": False}

    def paused(self, inputs: dict[str, Any], *, decoder: bool = False) -> PausedPass:
        """A forward pass of the model on such inputs, or of its decoder alone, not begun yet."""
        model: nn.Module = self.loader.decoder if decoder else self.loader.model
        return PausedPass(lambda: model(**inputs), self.stand_ins, self.loader.device)

    @torch.no_grad()
    def alone(self, index: int, number: int, hidden_BSH: Tensor, like: Any = None) -> Tensor:
        """Output of one decoder layer, which must be loaded, on hidden states that are given, [B, S, H].

        Args:
            index: the layer.
            number: of a batch, for its mask and its positions.
            hidden_BSH: what the layer is given.
            like: what such layers answer, with whatever hidden states; None for hidden states alone.
        """
        hidden_BSH = hidden_BSH.to(self.loader.device)
        mask = self.batches[number].attention_mask.to(self.loader.device)
        paused = self.paused({"inputs_embeds": hidden_BSH, "attention_mask": mask, "use_cache": False}, decoder=True)
        try:
            paused.begin()
            while paused.call is not None and paused.call.index < index:
                paused.go_on(hidden_BSH if like is None else with_hidden(like, hidden_BSH))
            if paused.call is None:
                raise UnsupportedModel(f"{type(self.loader.decoder).__name__} did not come to this layer", layer=index)
            made = paused.run(self.loader.layer(index), paused.call.with_hidden(hidden_BSH))
            return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]
        finally:
            paused.close()

    @contextlib.contextmanager
    def finished_with(self, answer: Callable[[], Any]) -> Iterator[None]:
        """The whole model with every decoder layer answering the same: for final norm, head and logits.

        Args:
            answer: gives the last layer's answer for the rows that the model is about to be asked about.
        """
        given: list[Any] = []

        def give(call: Call) -> Any:
            if call.index == 0 or not given:
                given[:] = [mapped(answer(), lambda tensor: tensor.to(self.loader.device))]
            return mapped(given[0], Tensor.clone) if call.index + 1 < self.loader.layers else given[0]

        with self.stand_ins.answering(give):
            yield

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
