"""Slow fp64 references of what sources show: loops over tokens and experts on raw weights, and stock autograd.

Nothing here uses hooks of a recorder, chunks, or the experts' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.anatomy import MoELayer, find_moe_layers
from tests.laws.recorded import IDS_BS, fresh


def inner_of(family: str, layer: MoELayer, expert: int, x_H: Tensor) -> Tensor:
    """Input of one expert's down projection for one token, from the raw weights."""
    experts: Any = layer.experts
    if family == "gpt_oss":
        both = x_H @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate_I = both[0::2].clamp(max=7.0)
        up_I = both[1::2].clamp(-7.0, 7.0)
        inner_I: Tensor = (up_I + 1) * gate_I * torch.sigmoid(1.702 * gate_I)
        return inner_I
    gate_I, up_I = (experts.gate_up_proj[expert] @ x_H).chunk(2)
    return gate_I * torch.sigmoid(gate_I) * up_I


def output_of(family: str, layer: MoELayer, expert: int, inner_I: Tensor) -> Tensor:
    """Output of one expert before gating, from the raw weights."""
    experts: Any = layer.experts
    if family == "gpt_oss":
        out_H: Tensor = inner_I @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        return out_H
    made_H: Tensor = experts.down_proj[expert] @ inner_I
    return made_H


@dataclass
class LayerSeen:
    """What one MoE layer showed, token by token, of all rows.

    Attributes:
        layer: the layer.
        hidden_NH: what its experts were given.
        chosen_NK: choices.
        weights_NK: their gate weights.
        block: (input, output) of the block, [N, H] each.
        decoder: (input, output) of the decoder layer.
    """

    layer: MoELayer
    hidden_NH: Tensor
    chosen_NK: Tensor
    weights_NK: Tensor
    block: tuple[Tensor, Tensor]
    decoder: tuple[Tensor, Tensor]


def _spied(module: Any, into: list[tuple[list[Tensor], Any]]) -> None:
    forward: Callable[..., Any] = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        into.append(([a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)], output))
        return output

    module.forward = wrapped


def seen(family: str, ids_BS: Tensor = IDS_BS) -> tuple[PreTrainedModel, dict[int, LayerSeen]]:
    """Run a model row by row with its modules' `forward` replaced; the graph is kept."""
    model = fresh(family)
    calls: dict[int, dict[str, list[Any]]] = {}
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    for index, layer in layers.items():
        calls[index] = {"experts": [], "block": [], "decoder": []}
        _spied(layer.experts, calls[index]["experts"])
        _spied(layer.block, calls[index]["block"])
        _spied(model.model.layers[index], calls[index]["decoder"])
    for row in ids_BS:
        model(input_ids=row[None], use_cache=False)

    def pair(made: list[Any]) -> tuple[Tensor, Tensor]:
        outputs = [o[0] if isinstance(o, tuple) else o for _, o in made]
        width = outputs[0].shape[-1]
        given = torch.cat([inputs[0].reshape(-1, width) for inputs, _ in made]).detach()
        return given, torch.cat([o.reshape(-1, width) for o in outputs]).detach()

    found = {}
    for index, layer in layers.items():
        experts = calls[index]["experts"]
        chosen_NK = torch.cat([next(t for t in inputs if not t.is_floating_point()) for inputs, _ in experts])
        gates = [[t for t in inputs if t.is_floating_point()][1] for inputs, _ in experts]
        weights_NK = torch.cat([t.reshape(-1, chosen_NK.shape[1]) for t in gates]).detach()
        hidden_NH = torch.cat([inputs[0].reshape(-1, inputs[0].shape[-1]) for inputs, _ in experts]).detach()
        found[index] = LayerSeen(
            layer, hidden_NH, chosen_NK, weights_NK, pair(calls[index]["block"]), pair(calls[index]["decoder"])
        )
    return model, found


def summed_loss(model: PreTrainedModel, ids_BS: Tensor = IDS_BS) -> Tensor:
    """Next-token cross-entropy summed over all rows, one row at a time, from log-probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    for row in ids_BS:
        scores_SV = model(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
        for position in range(len(row) - 1):
            total = total - scores_SV[position, row[position + 1]]
    return total
