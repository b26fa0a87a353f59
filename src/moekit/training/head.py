"""Cross-entropy without the logits of all tokens at once.

A vocabulary is far larger than a hidden size: the logits of a thousand tokens over 49,152 words take 200 MB, several
times over, and most of the time is spent moving them. Here the output projection and the loss run over slices of
tokens; a slice's gradient is computed while its logits are still in cache, so nothing is kept or computed twice.

Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.data.batches import IGNORED_LABEL

SLICE_BYTES = 48 << 20
PROBE_TOKENS = 8
# How far two ways to the same loss may differ by rounding, relative.
TOLERANCE = 1e-4


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden W^T + b)[label], its gradients computed on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        matrix_VH = weight_VH.to(dtype)
        rows = min(max(SLICE_BYTES // (4 * weight_VH.shape[0]), 16), max(hidden_NH.shape[0], 1))
        grad_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        # Buffers live through all slices: memory fresh from the system is slower than the arithmetic on it.
        products = hidden_NH.new_empty(rows, weight_VH.shape[0], dtype=dtype)
        exact = products if dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        for start in range(0, hidden_NH.shape[0], rows):
            part_NH = hidden_NH[start : start + rows].to(dtype)
            part_N1 = labels_N[start : start + rows].unsqueeze(1)
            product_NV, slope_NV = products[: len(part_NH)], exact[: len(part_NH)]
            torch.mm(part_NH, matrix_VH.T, out=product_NV)
            if exact is not products:
                slope_NV.copy_(product_NV)
            if bias_V is not None:
                slope_NV += bias_V
            torch.ops.aten._log_softmax.out(slope_NV, 1, False, out=slope_NV)
            total -= slope_NV.gather(1, part_N1).sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            # The slope of the loss: softmax minus one at the label.
            slope_NV.exp_()
            slope_NV.scatter_add_(1, part_N1, slope_NV.new_full(part_N1.shape, -1.0))
            if grad_V is not None:
                grad_V += slope_NV.sum(dim=0)
            if exact is not products:
                slope_NV = product_NV.copy_(slope_NV)
            if grad_NH is not None:
                grad_NH[start : start + rows] = slope_NV @ matrix_VH
            if grad_VH is not None:
                grad_VH += (slope_NV.T @ part_NH).float()
        ctx.save_for_backward(grad_NH, grad_VH, grad_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        scaled = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None)


def linear_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Summed cross-entropy of a linear output layer: fp32 scalar.

    Args:
        hidden_NH: last hidden states.
        weight_VH: output embedding.
        bias_V: its bias, if it has one.
        labels_N: the word that follows each token; `IGNORED_LABEL` leaves a token out.
        dtype: of the matrix products; the hidden states' own by default.
    """
    counted = labels_N != IGNORED_LABEL
    if not bool(counted.all()):
        hidden_NH, labels_N = hidden_NH[counted], labels_N[counted]
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, labels_N, dtype or hidden_NH.dtype
    )
    return total


def _loss_from_hidden(head: nn.Linear) -> Any:
    """A loss function in transformers' form that receives hidden states where it expects logits."""

    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
        flat_N = shift_labels.reshape(-1).to(logits.device)
        device = logits.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        with torch.autocast(device, enabled=False):
            total = linear_cross_entropy(logits.reshape(flat_N.numel(), -1), head.weight, head.bias, flat_N, dtype)
        count = (flat_N != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count

    return loss


@contextmanager
def _swapped(model: PreTrainedModel, head: nn.Linear) -> Iterator[None]:
    stock = model.loss_function
    model.loss_function = _loss_from_hidden(head)
    head.forward = lambda hidden: hidden  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del head.forward
        model.loss_function = stock


@torch.no_grad()
def _same_loss(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether both ways give the loss of a few random words; families that bend their logits do not."""
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, head.out_features, (1, PROBE_TOKENS), generator=generator).to(model.device)
    try:
        stock = model(input_ids=ids, labels=ids, use_cache=False).loss
        with _swapped(model, head):
            ours = model(input_ids=ids, labels=ids, use_cache=False).loss
        return bool(torch.isclose(ours.float(), stock.float(), rtol=TOLERANCE, atol=0.0))
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return False
    finally:
        model.train(training)


@contextmanager
def sliced_cross_entropy(model: PreTrainedModel) -> Iterator[bool]:
    """Let `model(input_ids, labels=...)` compute its loss in slices; its logits are hidden states meanwhile.

    Whether that gives the model's own loss is found by asking, on a few random words; where it does not, or the model
    is no causal LM with a linear head, everything stays stock.

    Yields:
        Whether the loss is computed in slices.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not nn.Linear or not _same_loss(model, head):
        yield False
        return
    with _swapped(model, head):
        yield True
