"""Gradients of the language-model loss at what the experts of each layer give, of a whole text, kept on disk.

The model runs as a whole and is differentiated once a batch, down to the summed outputs of the routed experts; no
weight learns and none is differentiated by. The loss is summed over tokens, not averaged, so that no small gradient is
lost to the format.

Legend: B rows, S positions, T positions of a batch, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekit._progress import Progress, track
from moekit.anatomy.probe import find_moe_layers, flat_output
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import load
from moekit.compress.engine.live import change_model
from moekit.compress.engine.request import CalibrationText
from moekit.compress.engine.rewriting import PlannedRewrite
from moekit.data.forcing import decoder_inputs
from moekit.errors import UnsupportedModel
from moekit.streaming.states import States
from moekit.trace.loss import Loss, next_token_loss
from moekit.trace.recorder import evaluating
from moekit.trace.rows import features_of, read_batch


def loss_gradients(
    checkpoint: Checkpoint,
    text: CalibrationText,
    progress: Progress | None = None,
    behind: PlannedRewrite | None = None,
) -> Mapping[int, States]:
    """Decoder layer -> gradients at the summed output of its routed experts, batch by batch as a pass numbers them.

    Args:
        checkpoint: the model, which is loaded as a whole.
        text: batches of padding alone are left out.
        progress: told batch by batch.
        behind: changes the model before; None takes it as it is.

    Raises:
        UnsupportedModel: a layer's experts ran more than once or gave something else than one value a position.
        OutOfBudget: the model does not fit in memory.
    """
    model = load(checkpoint.path, dtype=text.dtype or "auto", device=text.device)
    if behind is not None:
        change_model(model, behind.outcomes, behind)
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    batches = [batch for batch in text.batches if bool(read_batch(batch)[1].mask_BS.any())]
    shapes = [(int(n), int(m)) for n, m in (read_batch(batch)[0].shape for batch in batches)]
    if text.folder is not None:
        text.folder.mkdir(parents=True, exist_ok=True)
    kept = {
        index: States(shapes, layer.geometry.hidden, model.dtype, folder=text.folder, name=f"gradients-{index}")
        for index, layer in layers.items()
    }
    with evaluating(model), _watched({index: layer.experts for index, layer in layers.items()}) as seen:
        begin_at_embeddings(model)
        for number, batch in enumerate(track(batches, "differentiating", progress)):
            seen.clear()
            loss = loss_of(model, batch)
            found = torch.autograd.grad(loss, [_whole(seen, index, shapes[number]) for index in layers])
            for index, gradient in zip(layers, found, strict=True):
                kept[index].put(number, flat_output(gradient).reshape(*shapes[number], -1))
    return kept


def loss_of(model: Any, batch: Any, loss: Loss = next_token_loss) -> Tensor:
    """A batch's loss, summed over its tokens, with the way back."""
    ids_BS, labels = read_batch(batch)
    ids_BS, mask_BS = ids_BS.to(model.device), labels.mask_BS.to(model.device)
    inputs: dict[str, Any] = {"input_ids": ids_BS, "use_cache": False, "attention_mask": mask_BS.long()}
    inputs |= features_of(batch, model.device)
    inputs |= decoder_inputs(model, ids_BS, inputs["attention_mask"])
    with torch.enable_grad():
        return loss(model(**inputs).logits, ids_BS, mask_BS)


def begin_at_embeddings(model: Any) -> Any:
    """Leave a way back from the loss that begins at the embeddings: no weight is differentiated by.

    What this returns ends it.
    """
    model.requires_grad_(False)
    return model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_() if torch.is_grad_enabled() else None
    )


@contextlib.contextmanager
def _watched(experts: Mapping[int, nn.Module]) -> Iterator[dict[int, list[Tensor]]]:
    """See what experts give in each pass."""
    seen: dict[int, list[Tensor]] = {}

    def watch(index: int) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(index, []).append(output[0] if isinstance(output, tuple) else output)

        return see

    handles = [module.register_forward_hook(watch(index)) for index, module in experts.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _whole(seen: Mapping[int, list[Tensor]], index: int, shape: tuple[int, int]) -> Tensor:
    found = seen.get(index, [])
    if len(found) != 1 or len(flat_output(found[0])) != shape[0] * shape[1]:
        raise UnsupportedModel(
            "the experts do not give one output for each position of a batch",
            layer=index,
            hint="share the bits by errors instead of the loss (--share pmq)",
        )
    return found[0]
