"""Can experts of a model be dropped at all? Told by its config and shapes, before a weight is read.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from moekit.anatomy.probe import MoELayer, iterate_moe_layers
from moekit.compress.engine.counting import counted_axes
from moekit.compress.engine.resize import empty_resized
from moekit.compress.engine.token_table import token_tables
from moekit.errors import UnsupportedModel

_WORKS = "profile, place, check, reshard and estimate work on this model; dropping or merging experts does not"


def check_droppable(
    config: PreTrainedConfig,
    layers: Sequence[MoELayer],
    changed: Collection[int],
    file: Path | None = None,
    *,
    top_k: int | None = None,
) -> None:
    """Refuse to drop experts where something else goes by their number.

    Args:
        config: of the model.
        layers: all of its MoE layers, with or without weights.
        changed: decoder layers that lose experts.
        file: for the message.
        top_k: K from now on; None as before.

    Raises:
        UnsupportedModel: tensors outside of the MoE blocks count experts, too, or a table in a router names another
            number of experts for every token.
    """
    if top_k is not None:
        for layer in layers:
            _refuse_other_choices(layer, top_k, file)
    if not changed:
        return
    numbers = tuple(max(layer.geometry.experts for layer in layers) + more for more in (1, 2))
    models = [empty_resized(config, n) for n in numbers]
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in models]
    blocks = tuple(f"{layer.name}." for layer in iterate_moe_layers(models[0]))
    for name in counted_axes(shapes[0], shapes[1], (numbers[0], numbers[1])):
        if not name.startswith(blocks):
            raise UnsupportedModel(
                f"{name} counts experts, too, by the number that the config states for all of them, and no method "
                "decides which of those stay",
                file=file,
                hint=_WORKS,
            )


def _refuse_other_choices(layer: MoELayer, top_k: int, file: Path | None) -> None:
    for name, table in token_tables(layer):
        if table.shape[1] != top_k:
            raise UnsupportedModel(
                f"{name} names {table.shape[1]} experts of every token id, and {top_k} are to be chosen",
                file=file,
                layer=layer.index,
                hint=f"leave the number of choices at {table.shape[1]}",
            )
