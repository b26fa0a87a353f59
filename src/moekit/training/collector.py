"""What each router answered during a training forward, with the graph that leads to it.

Routers are observed by forward hooks, so families, routing policies and peft wrappers need no care. A *window* opens
and closes with the forward of the whole model; what routers answer outside of it is a repetition by activation
checkpointing, which must build the same graph again but counts nowhere. Evaluation and forwards without gradients are
ignored.

Legend: B rows, S positions, T tokens of the micro-batch (B times S), E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.errors import BadData, UnsupportedModel
from moekit.training.batch import MakeBatch, MicroBatch
from moekit.training.layers import TrainedLayer, trained_layers
from moekit.training.losses import probabilities, token_count


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


class RouterCollector:
    """Hands every answer of every router to a consumer, during training forwards only.

    Keeps nothing but ids and mask of the latest forward: what the consumer keeps is its own affair.

    Args:
        model: the model whose forward is called with the batch (peft-wrapped or not; not its DDP wrapper).
        consumer: called once per layer and forward, and once more per repetition.
        layers: its layers, if already known.
        make_batch: says more of a micro-batch than its ids and its mask.
    """

    def __init__(
        self,
        model: nn.Module,
        consumer: Consumer,
        layers: list[TrainedLayer] | None = None,
        make_batch: MakeBatch = MicroBatch,
    ) -> None:
        self.layers = trained_layers(model) if layers is None else layers
        self._consumer = consumer
        self._make_batch = make_batch
        self._inside = False
        self._armed = False
        self._batch = MicroBatch()
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
            *(layer.router.register_forward_hook(partial(self._answered, layer)) for layer in self.layers),
        ]

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._batch = MicroBatch()

    def _open(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._inside = True
        # A forward for evaluation or of a reference must not disturb the repetitions that are still to come.
        self._armed = model.training and torch.is_grad_enabled()
        if self._armed:
            ids = kwargs.get("input_ids", args[0] if args else None)
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            usable = isinstance(mask, Tensor) and mask.dim() == 2
            self._batch = self._make_batch(ids, mask if usable else None)

    def _close(self, *_: object) -> None:
        self._inside = False

    def _answered(self, layer: TrainedLayer, router: nn.Module, _: object, answer: Any) -> Any:
        if not router.training or (self._inside and not self._armed):
            return None
        logits_TE, weights_TK, indices_TK = answer
        mask_T = None if self._batch.mask_BS is None else self._batch.mask_BS.reshape(-1).bool()
        if mask_T is not None and mask_T.numel() != logits_TE.shape[0]:
            raise BadData(
                f"the attention mask covers {mask_T.numel()} positions, but the router saw {logits_TE.shape[0]} tokens",
                layer=layer.index,
                hint="train without virtual tokens or context parallelism, and run one backward per forward",
            )
        if mask_T is not None:
            mask_T = mask_T.to(logits_TE.device)
        routed = Routed(layer, logits_TE, weights_TK, indices_TK, mask_T, not self._inside, self._batch)
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
