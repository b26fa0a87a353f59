"""Attention sinks of a live model: the tokens that carry massive activations, and what attention pays them.

Legend: B texts, S positions, T = B S, E experts, H hidden, A attention heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.anatomy.probe import find_moe_layers
from moekit.diagnose.super_experts.ablation import Pair, by_layer, without_experts
from moekit.diagnose.super_experts.magnitudes import is_massive
from moekit.diagnose.super_experts.report import SHARED
from moekit.trace.batch import widest
from moekit.trace.recorder import evaluating
from moekit.trace.seam import decoder_layer, uses_sigmoid


@dataclass(frozen=True)
class Sink:
    """A token that carries a massive activation.

    Attributes:
        row: of the batch.
        position: in the row.
        token: its id.
        layer: after which decoder layer (of those with experts) the activation is largest.
        channel: which value of the residual stream.
        value: of it.
    """

    row: int
    position: int
    token: int
    layer: int
    channel: int
    value: float


def find_sinks(model: PreTrainedModel, ids_BS: Tensor) -> list[Sink]:
    """Tokens whose residual stream holds a massive activation after some MoE layer, wherever they stand.

    Args:
        model: a MoE.
        ids_BS: unpadded texts.
    """
    found: dict[tuple[int, int], Sink] = {}

    def look(layer: int, stream_BSH: Tensor) -> None:
        value_BS, channel_BS = stream_BSH.abs().float().max(dim=-1)
        median = stream_BSH.abs().float().median()
        for row, position in is_massive(value_BS, median).nonzero().tolist():
            channel = int(channel_BS[row, position])
            sink = Sink(
                row, position, int(ids_BS[row, position]), layer, channel, float(stream_BSH[row, position, channel])
            )
            if (known := found.get((row, position))) is None or abs(sink.value) > abs(known.value):
                found[row, position] = sink

    with contextlib.ExitStack() as hooks, evaluating(model):
        for layer in find_moe_layers(model):

            def after(module: nn.Module, args: Any, output: Any, index: int = layer.index) -> None:
                look(index, output[0] if isinstance(output, tuple) else output)

            hooks.callback(decoder_layer(model, layer).register_forward_hook(after).remove)
        model(input_ids=ids_BS.to(model.device), use_cache=False)
    return [found[place] for place in sorted(found)]


def sinks_mask(sinks: Collection[Sink], like_BS: Tensor) -> Tensor:
    """True at the sinks, [B, S]."""
    mask_BS = torch.zeros(like_BS.shape, dtype=torch.bool)
    for sink in sinks:
        mask_BS[sink.row, sink.position] = True
    return mask_BS


def sink_mass(attention_BASS: Tensor, sinks_BS: Tensor) -> Tensor:
    """Attention that all queries pay to the sinks, by text and head, [B, A].

    Args:
        attention_BASS: attention maps, queries before keys.
        sinks_BS: True at the sinks.
    """
    paid_BAS = attention_BASS.sum(dim=2, dtype=widest(attention_BASS.device))
    return (paid_BAS * sinks_BS.to(paid_BAS.device)[:, None]).sum(dim=-1)


def attention_sink_decay(before_BASS: Tensor, after_BASS: Tensor, sinks_BS: Tensor) -> float:
    """ASDR of one layer (paper section 5): 0 where sinks are kept, 1 where they are gone.

    1 - mean over texts and heads of (attention paid to sinks after) / (attention paid to sinks before).

    Args:
        before_BASS: attention maps of the whole model, queries before keys.
        after_BASS: those of the model without some experts.
        sinks_BS: True at the sinks. Heads that paid them nothing before are left out.
    """
    return _decay(sink_mass(before_BASS, sinks_BS), sink_mass(after_BASS, sinks_BS))


def _decay(before_BA: Tensor, after_BA: Tensor) -> float:
    paid_BA = before_BA > 0
    return float(1 - (after_BA[paid_BA] / before_BA[paid_BA]).mean()) if bool(paid_BA.any()) else 0.0


@torch.no_grad()
def _sink_masses(model: PreTrainedModel, ids_BS: Tensor, sinks_BS: Tensor) -> list[Tensor | None]:
    rows = []
    for ids_S, sinks_S in zip(ids_BS, sinks_BS, strict=True):  # maps of one text at a time
        maps = model(input_ids=ids_S[None].to(model.device), use_cache=False, output_attentions=True).attentions
        rows.append([None if m is None else sink_mass(m, sinks_S[None]).cpu() for m in maps])
    return [None if None in column else torch.cat(column) for column in zip(*rows, strict=True)]


def measure_sink_decay(
    model: PreTrainedModel, ids_BS: Tensor, pairs: Collection[Pair], sinks_BS: Tensor
) -> dict[int, float]:
    """ASDR of each attention layer when some experts are skipped.

    Args:
        model: a MoE; its attention runs eagerly meanwhile, the only way to see the maps.
        ids_BS: unpadded texts.
        pairs: what is skipped.
        sinks_BS: True at the sinks (`sinks_mask`).
    """
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            before = _sink_masses(model, ids_BS, sinks_BS)
            with without_experts(model, pairs):
                after = _sink_masses(model, ids_BS, sinks_BS)
    finally:
        model.set_attn_implementation(chosen)
    both = enumerate(zip(before, after, strict=True))
    return {layer: _decay(b, a) for layer, (b, a) in both if b is not None and a is not None}


def sink_router_scores(
    model: PreTrainedModel, ids_BS: Tensor, pairs: Collection[Pair], sinks_BS: Tensor
) -> dict[Pair, tuple[float, float]]:
    """Mean router score of each routed expert at the sinks, and at all other tokens.

    Args:
        model: a MoE.
        ids_BS: unpadded texts.
        pairs: the experts.
        sinks_BS: True at the sinks.
    """
    scores: dict[int, Tensor] = {}
    wanted = list(by_layer(model, [pair for pair in pairs if pair[1] != SHARED]))
    with contextlib.ExitStack() as hooks, evaluating(model):
        for layer, _ in wanted:
            sigmoid = uses_sigmoid(layer)

            def keep(m: nn.Module, args: Any, answer: Any, index: int = layer.index, sigmoid: bool = sigmoid) -> None:
                logits_TE = answer[0].reshape(-1, answer[0].shape[-1]).double().cpu()
                scores[index] = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)

            hooks.callback(layer.require_router().register_forward_hook(keep).remove)
        model(input_ids=ids_BS.to(model.device), use_cache=False)
    at_T = sinks_BS.flatten()
    return {
        (layer.index, e): (float(scores[layer.index][at_T, e].mean()), float(scores[layer.index][~at_T, e].mean()))
        for layer, experts in wanted
        for e in sorted(experts)
    }
