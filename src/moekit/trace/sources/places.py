"""Which decoder layers are recorded: those with experts, or, where nothing asked for is of experts, all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moekit.anatomy.probe import Geometry, MoELayer, iterate_moe_layers
from moekit.checkpoint.decoder import layers_of
from moekit.errors import BadConfig
from moekit.trace.seam import decoder_layer, recorded_layers
from moekit.trace.sources.base import Place


def moe_place(model: nn.Module, layer: MoELayer) -> Place:
    """The place of a MoE layer."""
    return Place(model, layer.index, decoder_layer(model, layer), layer.geometry, layer)


def dense_place(model: Any, index: int, decoder: nn.Module) -> Place:
    """The place of a decoder layer without routed experts."""
    hidden = int(model.get_input_embeddings().weight.shape[1])
    inner = getattr(getattr(decoder, "mlp", None), "down_proj", None)
    width = int(inner.weight.shape[1]) if isinstance(inner, nn.Linear) else 0
    return Place(model, index, decoder, Geometry(hidden, 0, 0, width, 0, True, False, False, True), None)


def recorded_places(model: nn.Module, wanted: Sequence[int] | None, *, routed: bool) -> list[Place]:
    """The decoder layers to record.

    Args:
        model: the model.
        wanted: decoder layers; None for all that can show what is asked for.
        routed: whether anything asked for is of experts: then only MoE layers can show it.

    Raises:
        BadConfig: a layer asked for is not there, or is dense and cannot show what is asked for.
        UnsupportedModel: no MoE where one is needed, or two MoE blocks in one decoder layer.
    """
    if routed:
        return [moe_place(model, layer) for layer in recorded_layers(model, wanted)]
    moe = {layer.index: layer for layer in iterate_moe_layers(model)}
    decoders = layers_of(model)
    if strange := sorted(set(wanted or ()) - set(range(len(decoders)))):
        raise BadConfig("there is no such decoder layer", layer=strange[0], hint=f"there are {len(decoders)}, from 0")
    return [
        moe_place(model, moe[index]) if index in moe else dense_place(model, index, decoder)
        for index, decoder in enumerate(decoders)
        if wanted is None or index in wanted
    ]
