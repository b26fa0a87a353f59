"""Run a model over a text and record it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Unpack

import torch
from torch import nn

from moekit._progress import Progress, track
from moekit.data.forcing import decoder_inputs
from moekit.errors import BadConfig, BadData
from moekit.trace.live import Recorder
from moekit.trace.recording import Recording, RecordingOptions
from moekit.trace.rows import features_of, read_batch
from moekit.trace.store import Trace

__all__ = ["Recorder", "evaluating", "record", "run_batch"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run_batch(recorder: Recorder, batch: Any) -> int:
    """One forward pass over a batch, padding-only rows left out; returns its tokens.

    A batch of padding alone is left out, too, unless other ranks wait for this one's part in every exchange.

    Raises:
        BadConfig: no batch of token ids, or an id the model does not embed.
    """
    ids_BS, labels = read_batch(batch)
    rows = labels.mask_BS.any(dim=1) if ids_BS.numel() else torch.zeros(len(ids_BS), dtype=torch.bool)
    if not bool(rows.any()):
        if recorder.is_awaited:
            recorder.model(input_ids=ids_BS.new_zeros(0, 1).to(recorder.device), use_cache=False)
        return 0
    if not bool(rows.all()):
        ids_BS, labels = ids_BS[rows], labels.rows(rows)
    model = recorder.model
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    largest, size = int(ids_BS.max()), embedding.weight.shape[0]
    if largest >= size or int(ids_BS.min()) < 0:
        raise BadConfig(
            f"token id {largest} lies outside the model's {size} embeddings",
            hint="tokenize with the tokenizer that belongs to the model",
        )
    device = recorder.device
    recorder.expect(labels)
    inputs: dict[str, Any] = {"input_ids": ids_BS.to(device), "use_cache": False}
    inputs |= features_of(batch, device)
    inputs["attention_mask"] = labels.mask_BS.to(device=device, dtype=torch.int64)
    inputs |= decoder_inputs(model, inputs["input_ids"], inputs["attention_mask"])
    if recorder.needs_loss:
        with torch.enable_grad():
            logits_BSV = model(**inputs).logits
            recorder.backward(recorder.recording.loss(logits_BSV, inputs["input_ids"], labels.mask_BS.to(device)))
        return int(labels.mask_BS.sum())
    # Nobody reads the logits: most families can leave all but the last out.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    model(**inputs)
    return int(labels.mask_BS.sum())


def record(
    model: nn.Module,
    batches: Iterable[Any],
    recording: Recording | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[RecordingOptions],
) -> Trace:
    """Run a model over a text and record what its routers choose.

    Args:
        model: a MoE, on any device; run in eval mode without gradients, and left in the mode it was in.
        batches: `moekit.data.Batch` objects; mappings with "input_ids" and "attention_mask"; or tensors of ids.
        recording: what to keep.
        progress: told of each batch.
        options: the fields of `Recording` (`statistics`, `keep_choices`, ...), where no `recording` is given.

    Returns:
        The trace; experts never routed are named in its `warnings`.

    Raises:
        BadData: the batches hold no tokens but padding.
        BadConfig: an unknown statistic, or a token id the model does not embed.
        NumericFault: NaN or infinity in a router, with its layer.
        UnsupportedModel: no MoE, or a compiled one.
    """
    recorder = Recorder(model, recording, **options)
    with recorder, evaluating(model):
        for batch in track(batches, "profiling", progress):
            run_batch(recorder, batch)
    if not recorder.tokens:
        raise BadData("the text holds no tokens but padding", hint="give a text that is not empty")
    return recorder.trace()
