"""How the loss depends on the output of every MoE block: one backward pass of the whole model, kept layer by layer.

Targets are drawn from the model itself: then the mean of g g^T is the Fisher information of its own distribution, and
half the mean of (g . D)^2 is, to second order, what a change D of an output costs in nats. Labels of the text would
give the empirical Fisher, which measures how wrong the model is on it as well.

Legend: B rows, S positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit._progress import Progress, track
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.errors import NumericFault, UnsupportedModel
from moekit.runtime.answering import telling_its_own_faults
from moekit.streaming.states import MEMORY_BYTES, States
from moekit.streaming.walk import Inputs

# Of a gradient on disk: its range is that of float32, and squares of many are added up.
STORED = torch.bfloat16


class BlockGradients:
    """Gradients at the outputs of all MoE blocks, by decoder layer and batch.

    Args:
        states: decoder layer -> gradients of all batches.
    """

    def __init__(self, states: Mapping[int, States]) -> None:
        self._states = dict(states)

    @classmethod
    def opened(
        cls,
        layers: Sequence[int],
        batches: Sequence[Inputs],
        hidden: int,
        folder: Path | None = None,
        limit: int = MEMORY_BYTES,
    ) -> BlockGradients:
        """Room for gradients, and those that lie in a folder already.

        Args:
            layers: decoder layers.
            batches: token ids and masks.
            hidden: H.
            folder: where gradients go; None keeps them in memory up to `limit`.
            limit: bytes kept in memory where no folder is given, of each layer.
        """
        shapes = [(batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in batches]
        return cls(
            {
                index: States(shapes, hidden, STORED, folder=folder, name=f"gradients-{index}", limit=limit)
                for index in layers
            }
        )

    def put(self, layer: int, batch: int, gradient_BSH: Tensor) -> None:
        """Keep those of a batch."""
        self._states[layer].put(batch, gradient_BSH)

    def get(self, layer: int, batch: int) -> Tensor:
        """[B, S, H]."""
        return self._states[layer].get(batch)

    def close(self) -> None:
        """Give files back."""
        for states in self._states.values():
            states.close()


def block_gradients(
    model: Any,
    batches: Sequence[Inputs],
    *,
    seed: int,
    folder: Path | None = None,
    limit: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> BlockGradients:
    """Differentiate the cross-entropy of targets drawn from the model, summed over tokens, by every block's output.

    Args:
        model: the whole model, in memory, in eval mode; no `grad` of it is touched.
        batches: token ids and masks; rows run one at a time.
        seed: of the draw.
        folder: where gradients go; None keeps them in memory up to `limit`.
        limit: bytes kept in memory where no folder is given, of each layer.
        progress: told batch by batch.

    Raises:
        UnsupportedModel: a block's output is not on the way to the loss.
        NumericFault: the model's own logits or the gradients are not finite.
    """
    layers = find_moe_layers(model)
    device, hidden = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[1]
    made = BlockGradients.opened([moe.index for moe in layers], batches, hidden, folder, limit)
    for number in track(range(len(batches)), "differentiating", progress):
        batch = batches[number]
        rows = {moe.index: torch.zeros(*batch.input_ids.shape, hidden) for moe in layers}
        for row in range(len(batch.input_ids)):
            ids_1S, mask_1S = (t[row : row + 1].to(device) for t in (batch.input_ids, batch.attention_mask))
            if not bool(mask_1S.any()):
                continue
            generator = torch.Generator().manual_seed((seed << 32) + (number << 16) + row)
            for index, gradient in row_gradients(model, layers, ids_1S, mask_1S, generator).items():
                rows[index][row] = gradient.reshape(-1, hidden).float().cpu()
        for index, gradient_BSH in rows.items():
            made.put(index, number, gradient_BSH)
    return made


@torch.enable_grad()
def row_gradients(
    model: Any, layers: Sequence[MoELayer], ids_1S: Tensor, mask_1S: Tensor, generator: torch.Generator
) -> dict[int, Tensor]:
    """Decoder layer -> gradient at its block's output, on one row of tokens.

    Args:
        model: the model.
        layers: its MoE layers.
        ids_1S: the row.
        mask_1S: 0 at padding, whose positions add nothing to the loss.
        generator: of the draw of targets.
    """
    with _outputs(model, layers) as outputs, telling_its_own_faults(model):
        logits_SV = model(input_ids=ids_1S, attention_mask=mask_1S, use_cache=False).logits[0].float()
    logs_SV = logits_SV.log_softmax(-1)
    if not bool(logs_SV.isfinite().all()):
        raise NumericFault("the model's own predictions are NaN or infinite", hint="see `moekit check`")
    target_S = torch.multinomial(logs_SV.detach().exp().cpu(), 1, generator=generator)[:, 0].to(logs_SV.device)
    loss = -(logs_SV.gather(1, target_S[:, None])[:, 0] * mask_1S[0]).sum()
    missing = [moe.index for moe in layers if moe.index not in outputs or not outputs[moe.index].requires_grad]
    if missing:
        raise UnsupportedModel(
            "the forward pass left no way back from the loss to this block",
            layer=missing[0],
            hint="price by changes instead of gradients (--price change)",
        )
    found = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    gradients = {}
    for (index, output), gradient in zip(outputs.items(), found, strict=True):
        gradients[index] = torch.zeros_like(output) if gradient is None else gradient
        if not bool(gradients[index].isfinite().all()):
            raise NumericFault("the gradient at the block's output is NaN or infinite", layer=index)
    return gradients


@contextmanager
def _outputs(model: Any, layers: Sequence[MoELayer]) -> Iterator[dict[int, Tensor]]:
    """Outputs of all blocks of the forward pass inside, in a graph even where no parameter learns."""
    outputs: dict[int, Tensor] = {}

    def see(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def learn(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    handles = [model.get_input_embeddings().register_forward_hook(learn)]
    handles += [moe.block.register_forward_hook(see(moe.index)) for moe in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
