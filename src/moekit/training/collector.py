"""What each router answered during a training forward, with the graph that leads to it.

Routers are observed by forward hooks, so families, routing policies and peft wrappers need no care; which calls count,
`moekit.training.window` says.

Legend: B rows, S positions, T tokens of the micro-batch (B times S), E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.errors import BadData, UnsupportedModel
from moekit.training.batch import MicroBatch
from moekit.training.layers import TrainedLayer, trained_layers
from moekit.training.losses import probabilities, token_count
from moekit.training.window import Window


@dataclass(frozen=True, eq=False)
class Routed:
    """One layer's answer for one micro-batch: what objectives on routers see.

    Attributes:
        layer: which layer, with its geometry, scores and selection bias.
        logits_TE: router logits, in the graph.
        weights_TK: weights of the chosen experts, in the graph.
        indices_TK: chosen experts, E where a place stayed empty.
        mask_T: bool, False at padding; None where the forward was given no attention mask.
        repeated: whether activation checkpointing repeats a forward already seen.
        batch: the micro-batch: ids, mask, text, step, progress, teacher.
    """

    layer: TrainedLayer
    logits_TE: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    mask_T: Tensor | None
    repeated: bool
    batch: MicroBatch

    @cached_property
    def probabilities_TE(self) -> Tensor:
        """Gate probabilities that sum to one per token, fp32, in the graph."""
        return probabilities(self.logits_TE, self.layer.scores)

    @property
    def tokens(self) -> Tensor:
        """Tokens that are no padding: int64 scalar."""
        return token_count(self.logits_TE, self.mask_T)

    def sequences(self) -> Iterator[Routed]:
        """The same for each row [1, S] of the batch.

        Raises:
            BadData: the forward was given neither ids nor a mask, so rows are not known.
        """
        if self.batch.shape is None:
            raise BadData("where rows begin is not known: give input_ids or attention_mask", layer=self.layer.index)
        for row in range(self.batch.shape[0]):
            part = slice(row * self.batch.shape[1], (row + 1) * self.batch.shape[1])
            yield replace(
                self,
                logits_TE=self.logits_TE[part],
                weights_TK=self.weights_TK[part],
                indices_TK=self.indices_TK[part],
                mask_T=None if self.mask_T is None else self.mask_T[part],
            )


# Receives each answer; may return weights [T, K] to be used in place of the router's.
Consumer = Callable[[Routed], Tensor | None]
# Told of a layer whose answer fits no token of the micro-batch.
Misfit = Callable[[int, BadData], None]


class RouterCollector:
    """Hands every answer of every router to a consumer, during training forwards only.

    Keeps nothing but ids and mask of the latest forward: what the consumer keeps is its own affair.

    Args:
        model: the model whose forward is called with the batch (peft-wrapped or not; not its DDP wrapper).
        consumer: called once per layer and forward, and once more per repetition.
        layers: its layers, if already known; all must have a router that follows the contract.
        window: the model's forwards, if already followed; whoever gives it closes it.
        misfit: told of answers that are not about the positions of the micro-batch; without it they are an error.

    Raises:
        UnsupportedModel: a router does not follow the contract.
    """

    def __init__(
        self,
        model: nn.Module,
        consumer: Consumer,
        layers: list[TrainedLayer] | None = None,
        window: Window | None = None,
        misfit: Misfit | None = None,
    ) -> None:
        self.layers = trained_layers(model) if layers is None else layers
        routers = [layer.router for layer in self.layers]
        self._consumer = consumer
        self._misfit = misfit
        self._window = Window(model) if window is None else window
        self._owns_window = window is None
        self._handles: list[RemovableHandle] = [
            router.register_forward_hook(partial(self._answered, layer))
            for layer, router in zip(self.layers, routers, strict=True)
        ]

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._owns_window:
            self._window.close()

    def _answered(self, layer: TrainedLayer, router: nn.Module, _: object, answer: Any) -> Any:
        window = self._window
        if not window.trains(router):
            return None
        logits_TE, weights_TK, indices_TK = answer
        try:
            mask_T = window.mask(logits_TE.shape[0], layer.index)
        except BadData as error:
            if self._misfit is None:
                raise
            return self._misfit(layer.index, error)
        if mask_T is not None:
            mask_T = mask_T.to(logits_TE.device)
        routed = Routed(layer, logits_TE, weights_TK, indices_TK, mask_T, not window.inside, window.batch)
        replaced = self._consumer(routed)
        return None if replaced is None else (logits_TE, replaced, indices_TK)


@contextmanager
def collect(model: nn.Module) -> Iterator[list[Routed]]:
    """Collect the answers of training forwards, to add losses to a loss of one's own.

    >>> with collect(model) as routed:
    ...     loss = model(**batch).loss
    ...     loss = loss + sum(balance_loss(r.logits_TE, r.indices_TK, r.mask_T) for r in routed)
    ...     loss.backward()

    The list holds the graph: clear it, or leave the block, after each backward.

    Raises:
        UnsupportedModel: under reentrant activation checkpointing, where what is collected leads to no gradient.
    """
    routed: list[Routed] = []

    def keep(answer: Routed) -> None:
        if answer.repeated:
            return
        if not torch.is_grad_enabled():
            raise UnsupportedModel(
                "reentrant activation checkpointing hides the router's graph",
                layer=answer.layer.index,
                hint='use gradient_checkpointing_kwargs={"use_reentrant": False}, or MoECallback',
            )
        routed.append(answer)

    collector = RouterCollector(model, keep)
    try:
        yield routed
    finally:
        collector.close()
        routed.clear()
