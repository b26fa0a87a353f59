"""Put packed experts into a live model, and take them out for saving."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.hollow import hollow_names
from moekit.checkpoint.layout import layout_of
from moekit.checkpoint.packed_loading import PackedMatrix, PackedWeights, packed_matrices, packed_weights
from moekit.checkpoint.skeleton import empty_model
from moekit.errors import BadConfig
from moekit.experts.factored_model import replaced_weights
from moekit.experts.methods.packed import Packed
from moekit.experts.packing import columns_of, computable, matrices_of_layer, tensors_of_layer
from moekit.runtime.attachment import Attachment, attach, attached


def attach_packed(
    model: PreTrainedModel, checkpoint: Checkpoint, *, kernel: Literal["auto", "none"] = "auto"
) -> Attachment:
    """Let a model that was loaded without experts compute them as they lie in its folder.

    Args:
        model: from `moekit.checkpoint.load(folder, keep_packed=True)`.
        checkpoint: the folder.
        kernel: see `Packed`.

    Raises:
        BadCheckpoint: an expert lacks a matrix.
        UnsupportedModel: a family whose experts do not follow from their matrices.
    """
    layers: dict[int, list[PackedMatrix]] = {}
    for matrix in packed_matrices(checkpoint):
        layers.setdefault(matrix.layer, []).append(matrix)
    for layer in find_moe_layers(model):
        if layer.index in layers:
            computable(layer.experts, layer.index)
    constants = {index: tensors_of_layer(some, index) for index, some in sorted(layers.items())}
    return attach(model, Packed(kernel=kernel), constants)


def packed_of(model: PreTrainedModel) -> PackedWeights | None:
    """The packed experts of a live model, as its folder holds them; None where it has none.

    Raises:
        BadConfig: its experts are in memory as floats, too, or were taken off.
    """
    found = next((a for a in attached(model, "experts") if isinstance(a.part, Packed) and _any(a)), None)
    hollow = hollow_names(model) - replaced_weights(model)
    if (found is None) != (not hollow):
        raise BadConfig(
            "packed experts belong to a model without floats in their place, and it to them",
            hint="load the exported folder (moekit.load), with parts=False for floats",
        )
    if found is None:
        return None
    matrices = [
        matrix
        for layer, on in found.layers.items()
        for matrix in matrices_of_layer(on.stored, layer, columns_of(on.geometry))
    ]
    return packed_weights(matrices, layout_of(empty_model(model.config)))


def _any(attachment: Attachment) -> bool:
    return any("slot" in on.stored for on in attachment.layers.values())
