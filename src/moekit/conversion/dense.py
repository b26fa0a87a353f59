"""Read a dense causal LM, and refuse the ones whose function a MoE layout of transformers cannot express."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moekit.conversion.maths import DenseFFN
from moekit.errors import BadConfig, BadData, UnsupportedModel

# Families with pre-norm blocks, plain RMSNorm, rotary attention and a gated SiLU network, and no multipliers besides.
DENSE_FAMILIES = ("llama", "mistral", "qwen2")
# Calibration inputs held in memory at once.
INPUT_BYTES = 1 << 30
PADDING = -1


def check_dense(model: PreTrainedModel) -> None:
    """Refuse models that cannot be converted exactly.

    Raises:
        UnsupportedModel: not of a known dense family, or with biases that no MoE layout has.
    """
    kind = getattr(model.config, "model_type", "?")
    if kind not in DENSE_FAMILIES:
        raise UnsupportedModel(
            f"a {kind!r} model cannot be turned into a MoE without changing its function",
            hint=f"dense models of these types can: {', '.join(DENSE_FAMILIES)}",
        )
    if model.config.hidden_act != "silu":
        raise UnsupportedModel(f"the activation {model.config.hidden_act!r} is not silu", hint="use a SwiGLU model")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            raise UnsupportedModel(f"{name} has no place in a MoE layout", hint="convert a model without this bias")
        if parameter.device.type == "meta":
            raise UnsupportedModel(f"{name} is not loaded", hint="load the model onto a real device first")


def ffn_of(model: PreTrainedModel, layer: int) -> DenseFFN:
    """The feed-forward weights of a decoder layer, detached."""
    mlp = _mlps(model)[layer]
    weights = [getattr(mlp, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj")]
    return DenseFFN(*weights)


def _mlps(model: PreTrainedModel) -> list[nn.Module]:
    layers: Any = model.get_decoder().layers
    return [layer.mlp for layer in layers]


def check_calibration(calibration: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuse token ids that are empty or not of this model; -1 marks padding at the end of a row.

    Raises:
        BadData: wrong shape or no token.
        BadConfig: ids outside the embedding.
    """
    if calibration.dim() != 2 or calibration.is_floating_point() or not (calibration != PADDING).any():
        raise BadData(
            f"calibration of type {calibration.dtype} and shape {list(calibration.shape)} holds no rows of token ids",
            hint="give text that holds some words (--data); from Python, `pack(docs, tokenizer, 512).calibration`",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    low, high = int(calibration.min()), int(calibration.max())
    if low < PADDING or high >= rows:
        raise BadConfig(
            f"calibration holds the ids {low}..{high}, the model embeds {rows} tokens",
            hint="tokenize with the tokenizer that belongs to the model",
        )


@torch.no_grad()
def ffn_inputs(
    model: PreTrainedModel, calibration: torch.Tensor, layers: list[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """What flows into the feed-forward networks on calibration text.

    Holds as many layers as fit into 1 GiB and repeats the forward pass for the next ones.

    Args:
        model: the dense model.
        calibration: token ids [B, S], -1 at padding, which is left out.
        layers: decoder layers, ascending.

    Yields:
        Layer and its inputs, float32 [N, H], N tokens that are no padding.
    """
    per_layer = calibration.numel() * model.config.hidden_size * 4
    at_once = max(1, INPUT_BYTES // per_layer)
    for start in range(0, len(layers), at_once):
        group = layers[start : start + at_once]
        kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in group}
        mlps = _mlps(model)

        def keeper(layer: int, kept: dict[int, list[torch.Tensor]] = kept) -> Any:
            return lambda _, args: kept[layer].append(args[0].detach().flatten(0, -2).float())

        handles = [mlps[layer].register_forward_pre_hook(keeper(layer)) for layer in group]
        training = model.training
        model.eval()
        try:
            for row in calibration.long().to(model.device):
                tokens = row[row != PADDING]
                if len(tokens):
                    # logits of one position only: a full vocabulary per token would dwarf everything else
                    model(tokens[None], use_cache=False, logits_to_keep=1)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        for layer in group:
            yield layer, torch.cat(kept.pop(layer))
