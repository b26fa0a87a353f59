"""Cross-entropy without the logits of all tokens at once.

A vocabulary is far larger than a hidden size: the logits of a thousand tokens over 49,152 words take 200 MB, several
times over, and most of the time is spent moving them. Here the output projection and the loss run over slices of
tokens; a slice's gradient is computed while its logits are still in cache, so nothing is kept or computed twice.

Legend: N tokens, n tokens of a slice, H hidden, V vocabulary, B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.data.batches import IGNORED_LABEL
from moekit.training.batch import MicroBatch

SLICE_BYTES = 48 << 20


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


@dataclass(frozen=True, eq=False)
class OutputInputs:
    """What objectives on the output see of one micro-batch.

    Attributes:
        batch: ids, mask, text, step, progress, teacher.
        labels_N: the token that follows each position, `IGNORED_LABEL` where none counts.
        count: what sums over tokens are divided by: counted tokens of the whole optimizer step, over micro-batches and
            ranks; or of this micro-batch, where the family's loss knows no more.
        hidden_NH: last hidden states, as the output layer reads them; None where the family does more with them than
            that layer (it scales or caps its logits).
        head: the output layer; None in that case.
        stock_NV: the family's own logits in that case.
        stock_loss: its own loss in that case.
    """

    batch: MicroBatch
    labels_N: Tensor
    count: Tensor | int
    hidden_NH: Tensor | None = None
    head: nn.Linear | None = None
    stock_NV: Tensor | None = None
    stock_loss: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        if self.head is not None:
            return int(self.head.weight.shape[0])
        assert self.stock_NV is not None
        return int(self.stock_NV.shape[-1])

    def cross_entropy(self) -> Tensor:
        """Summed cross-entropy of the labels over `count`: fp32 scalar; the logits are never there all at once."""
        if self.hidden_NH is None or self.head is None:
            assert self.stock_loss is not None
            return self.stock_loss
        device = self.hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.weight.dtype
        with torch.autocast(device, enabled=False):
            total = linear_cross_entropy(self.hidden_NH, self.head.weight, self.head.bias, self.labels_N, dtype)
        return total / self.count

    def sum_over_tokens(self, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum of a term over the counted positions, their logits a slice at a time.

        Args:
            term: of logits [n, V] in fp32 and the numbers of their positions [n]: a scalar. It is called again in the
                backward pass, so that no slice's logits are kept.

        Returns:
            Scalar fp32.
        """
        positions_N = (self.labels_N != IGNORED_LABEL).nonzero().squeeze(1)
        rows = max(SLICE_BYTES // (4 * self.vocabulary), 16)
        total = self.labels_N.new_zeros((), dtype=torch.float32)
        for part_n in torch.split(positions_N, rows):
            total = total + checkpoint(self._term_of, term, part_n, use_reentrant=False)
        return total

    def _term_of(self, term: Callable[[Tensor, Tensor], Tensor], part_n: Tensor) -> Tensor:
        if self.hidden_NH is not None and self.head is not None:
            # Not a call of the module: that one is diverted.
            logits_nV = nn.functional.linear(self.hidden_NH[part_n], self.head.weight, self.head.bias)
            return term(logits_nV.float(), part_n)
        assert self.stock_NV is not None
        return term(self.stock_NV[part_n].float(), part_n)


def next_labels(labels_BS: Tensor) -> Tensor:
    """The label that follows each position: [N], `IGNORED_LABEL` behind the last of a row."""
    return nn.functional.pad(labels_BS, (0, 1), value=IGNORED_LABEL)[..., 1:].reshape(-1)


class OutputTap:
    """Lets a loss of one's own take the place of a model's loss, for chosen calls and inside their forward.

    In such a call (`reading`) the output layer is given no token, and the loss is computed from the hidden states that
    it would have read, before the forward of the model ends: so it works under DDP, FSDP and peft. All other calls are
    left alone: `model(...).logits` stay logits.

    Args:
        model: whose forward is called (peft-wrapped or not; not its DDP wrapper).
        head: its output layer, if the loss can be computed from what it reads; None leaves both to the family.
        compute: the loss of one micro-batch.
    """

    def __init__(self, model: nn.Module, head: nn.Linear | None, compute: Callable[[OutputInputs], Tensor]) -> None:
        self.head = head
        self._compute = compute
        self._batch: MicroBatch | None = None
        self._labels_N: Tensor | None = None
        self._count: Tensor | int | None = None
        self._hidden: Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            # Ahead of others: FSDP takes the output layer's weights away in a hook of its own.
            model.register_forward_hook(self._close, prepend=True),
        ]
        if head is not None:
            self._handles.append(head.register_forward_pre_hook(self._divert))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def reading(self, batch: MicroBatch) -> Iterator[None]:
        """Compute the loss of the calls inside; they must be given `labels`."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = self._labels_N = self._count = self._hidden = None

    def _open(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._batch is None:
            return None
        shifted = kwargs.get("shift_labels")
        self._labels_N = next_labels(kwargs["labels"]) if shifted is None else shifted.reshape(-1)
        self._count = kwargs.get("num_items_in_batch")
        if self.head is None:
            return None
        without = ("labels", "shift_labels", "num_items_in_batch")
        return args, {key: value for key, value in kwargs.items() if key not in without}

    def _divert(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._batch is None:
            return None
        self._hidden = args[0]
        return (args[0][..., :0, :],)

    def _close(self, model: nn.Module, args: Any, output: Any) -> Any:
        if self._batch is None:
            return None
        assert self._labels_N is not None
        if self.head is None:
            logits_NV = output["logits"].reshape(self._labels_N.numel(), -1)
            own: dict[str, Any] = {"stock_NV": logits_NV, "stock_loss": output["loss"]}
        else:
            assert self._hidden is not None
            own = {"hidden_NH": self._hidden.reshape(self._labels_N.numel(), -1), "head": self.head}
        device = next(iter(own.values())).device
        labels_N = self._labels_N.to(device)
        count = (labels_N != IGNORED_LABEL).sum() if self._count is None else self._count
        output["loss"] = self._compute(OutputInputs(self._batch, labels_N, count, **own))
        return output
