"""How much a loss depends on each part of some matrices' inputs, to first order, over a text.

Zeroing a part z changes the loss by - z dL/dz; sizes of that are summed token by token, as for neurons of routed
experts. The whole model is differentiated, and no weight by.

Legend: N positions of a batch, P parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit._progress import Progress, track
from moekit.compress.engine.dense_cuts import Cuttable
from moekit.compress.engine.loss_gradients import begin_at_embeddings, loss_of
from moekit.errors import NumericFault
from moekit.trace.loss import Loss, next_token_loss
from moekit.trace.recorder import evaluating
from moekit.trace.rows import read_batch


def part_scores(
    model: Any,
    batches: Sequence[Any],
    parts: Mapping[str, Cuttable],
    loss: Loss = next_token_loss,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Name of a matrix -> sum over tokens of |z . dL/dz| for each part of its inputs, [P] fp64.

    Args:
        model: as a whole; no weight of it may be learning.
        batches: of a text; those of padding alone are left out.
        parts: by name of the matrix.
        loss: what is differentiated.
        progress: told batch by batch.

    Raises:
        NumericFault: a gradient is not finite; names the layer.
    """
    found = {name: torch.zeros(each.parts, dtype=torch.float64) for name, each in parts.items()}
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return model.get_submodule(name).register_forward_pre_hook(see)

    begun = begin_at_embeddings(model)
    handles = [begun, *(watch(name) for name in parts)]
    try:
        with evaluating(model):
            for batch in track(batches, "differentiating", progress):
                if not bool(read_batch(batch)[1].mask_BS.any()):
                    continue
                seen.clear()
                gradients = torch.autograd.grad(loss_of(model, batch, loss), [seen[name] for name in parts])
                for (name, each), gradient in zip(parts.items(), gradients, strict=True):
                    product = (seen[name].detach().double() * gradient.double()).reshape(
                        -1, each.parts, _size(seen[name], each)
                    )
                    found[name] += product.sum(-1).abs().sum(0).cpu()
    finally:
        for handle in handles:
            handle.remove()
    for name, score_P in found.items():
        if not bool(score_P.isfinite().all()):
            raise NumericFault("gradients are NaN or infinite", layer=parts[name].layer, hint="--dtype float32")
    return found


def _size(given: Tensor, each: Cuttable) -> int:
    return given.shape[-1] // each.parts


def strongest(score_P: Tensor, keep: int) -> tuple[int, ...]:
    """The parts of the largest scores, ascending; of equal ones the first stays."""
    return tuple(sorted(score_P.argsort(descending=True, stable=True)[:keep].tolist()))
