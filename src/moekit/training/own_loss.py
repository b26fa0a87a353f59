"""A model's own loss: whether it computes one, whether slices of tokens give the same, and those slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.training.batch import MicroBatch
from moekit.training.head import OutputInputs, OutputTap

PROBE_TOKENS = 8
# How far two ways to the same loss may differ by rounding, relative.
TOLERANCE = 1e-4
# What models raise of themselves where what they were asked for is not there.
_OWN_FAULTS = (TypeError, RuntimeError, ValueError, AttributeError, KeyError, IndexError)


@contextmanager
def _asking(model: PreTrainedModel, vocabulary: int) -> Iterator[dict[str, Any]]:
    """A question of a few random words to a model in eval mode, without gradients."""
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)
    try:
        with torch.no_grad():
            yield {"input_ids": ids, "labels": ids, "use_cache": False}
    finally:
        model.train(training)


def computes_loss(model: PreTrainedModel) -> bool:
    """Whether a model comes to an end with a loss, with its config as it is."""
    with _asking(model, model.get_input_embeddings().weight.shape[0]) as question:
        try:
            return model(**question).loss is not None
        except _OWN_FAULTS:
            return False


def readable_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, if the model's own loss can be computed from what it reads.

    Whether it can is found by asking, on a few random words; families that scale or cap their logits fail.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not nn.Linear:
        return None
    tap = OutputTap(model, head, OutputInputs.cross_entropy)
    try:
        with _asking(model, head.out_features) as question:
            stock = model(**question).loss
            with tap.reading(MicroBatch(question["input_ids"])):
                ours = model(**question).loss
            return head if bool(torch.isclose(ours.float(), stock.float(), rtol=TOLERANCE, atol=0.0)) else None
    except _OWN_FAULTS:
        return None
    finally:
        tap.close()


class SlicedLoss:
    """A model's language-modelling loss in slices of tokens; the model itself is left as it is.

    Args:
        model: a causal LM with a linear output layer; any other computes its own loss.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tap = OutputTap(model, readable_head(model), OutputInputs.cross_entropy)

    def __bool__(self) -> bool:
        """Whether slices give the model's own loss."""
        return self._tap.head is not None

    def __call__(self, **batch: Any) -> Tensor:
        """The loss of a batch: the arguments of the model's forward, `labels` among them."""
        with self._tap.reading(MicroBatch(batch.get("input_ids"), batch.get("attention_mask"))):
            loss: Tensor = self._model(**batch).loss
        return loss

    def close(self) -> None:
        """Remove all hooks."""
        self._tap.close()


@contextmanager
def sliced_cross_entropy(model: PreTrainedModel) -> Iterator[SlicedLoss]:
    """`loss(**batch)` computes a model's loss in slices of tokens.

    >>> with sliced_cross_entropy(model) as loss:
    ...     loss(input_ids=ids, labels=ids).backward()
    """
    loss = SlicedLoss(model)
    try:
        yield loss
    finally:
        loss.close()
