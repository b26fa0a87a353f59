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
from moekit.errors import UnsupportedModel

_WORKS = "profile, place, check, reshard and estimate work on this model; dropping or merging experts does not"


def check_droppable(
    config: PreTrainedConfig, layers: Sequence[MoELayer], changed: Collection[int], file: Path | None = None
) -> None:
    """Refuse to drop experts where something else goes by their number.

    Args:
        config: of the model.
        layers: all of its MoE layers, with or without weights.
        changed: decoder layers that lose experts.
        file: for the message.

    Raises:
        UnsupportedModel: a table in a router names experts by number, or tensors outside of the MoE blocks count
            experts, too.
    """
    if not changed:
        return
    for layer in layers:
        if layer.index in changed:
            _refuse_table(layer, file)
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


def _refuse_table(layer: MoELayer, file: Path | None) -> None:
    held = {*(module for module in layer.experts.modules()), *(m for s in layer.shared for m in s.modules())}
    for path, module in layer.block.named_modules():
        if module in held and module is not layer.block:
            continue
        for name, buffer in module._buffers.items():
            saved = name not in module._non_persistent_buffers_set
            # [tokens, K]; a vector would count something of every expert, and is cut by its shape.
            if buffer is not None and saved and buffer.dim() == 2 and not buffer.dtype.is_floating_point:
                raise UnsupportedModel(
                    f"{path}.{name} of shape {list(buffer.shape)} names the experts of every token id by number: "
                    "tokens whose experts go would be left without",
                    file=file,
                    layer=layer.index,
                    hint=_WORKS,
                )
