"""Checkpoints whose layers hold different numbers of experts: the config names the largest, the record every layer's.

Stock transformers knows one number for all layers and does not load them; `moekit.load` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moekit.checkpoint.decoder import has_stack, layers_of, stack_of, stacks_of
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, stated_depth, stated_experts
from moekit.checkpoint.record import RECORD_FILE
from moekit.errors import BadCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from moekit.checkpoint.folder import Checkpoint


def uneven_counts(checkpoint: Checkpoint) -> dict[int, int]:
    """Decoder layer -> E, where the record says that layers differ; empty otherwise.

    Raises:
        BadCheckpoint: a number that the config, which names the largest, does not allow.
    """
    recorded = {} if checkpoint.record is None else checkpoint.record.expectations.experts
    layers, most = stated_depth(checkpoint.config), stated_experts(checkpoint.config)
    # Multi-token-prediction layers follow the decoder layers on disk.
    counts = {layer: n for layer, n in recorded.items() if layers is None or layer < layers}
    if len(set(counts.values())) <= 1:
        return {}
    for layer, count in counts.items():
        if count < 1 or (most is not None and count > most):
            raise BadCheckpoint(
                f"the record says {count} experts, the config allows 1 to {most}",
                file=checkpoint.path / RECORD_FILE,
                layer=layer,
                hint="restore the record and the config from a copy",
            )
    return counts


def live_counts(model: nn.Module) -> dict[int, int]:
    """Decoder layer -> E of a live model, where layers differ; empty otherwise."""
    counts: dict[int, int] = {}
    for index, layer in enumerate(layers_of(model) if has_stack(model) else ()):
        for module in layer.modules():
            down = module._parameters.get("down_proj")
            if isinstance(getattr(module, "num_experts", None), int) and down is not None:
                # A module that holds one rank's share says how many the layer has.
                counts[index] = getattr(module, "experts_in_layer", down.shape[0])
    return counts if len(set(counts.values())) > 1 else {}


def with_counts(
    model: PreTrainedModel, counts: Mapping[int, int], build: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    """Give each decoder layer its own number of experts.

    Args:
        model: without weights, built from the config.
        counts: decoder layer -> E.
        build: makes such a model from a config.

    Raises:
        BadCheckpoint: a layer that the model does not have.
    """
    stated = stated_experts(model.config.to_dict())
    by_count: dict[int, list[int]] = {}
    for layer, count in counts.items():
        if count != stated:
            by_count.setdefault(count, []).append(layer)
    for count, layers in by_count.items():
        config = copy.deepcopy(model.config)
        for key in EXPERT_COUNT_KEYS:
            if isinstance(config.get_text_config().to_dict().get(key), int):
                setattr(config.get_text_config(), key, count)
        other = build(config)
        for layer in layers:
            _exchange(model, other, layer)
    if by_count:
        without_common_loss(model.config)
    return model


def without_common_loss(config: PreTrainedConfig) -> None:
    """Switch the stock balance loss off: it stacks the routers' answers of all layers, which must be equally wide."""
    text = config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False


def _exchange(model: PreTrainedModel, other: PreTrainedModel, layer: int) -> None:
    (ours, number), (theirs, _) = (_place(m, layer) for m in (model, other))
    ours[number] = theirs[number]
    for module in ours[number].modules():
        if hasattr(module, "config"):
            # One object for the whole model: which experts implementation runs is chosen there.
            module.config = model.config.get_text_config()


def _place(model: nn.Module, layer: int) -> tuple[nn.ModuleList, int]:
    """The list that holds a layer, and where in it."""
    try:
        stacks = stacks_of(model)
    except UnsupportedModel as error:
        raise BadCheckpoint(
            f"{error.message}, so they cannot differ", hint="the record belongs to another model"
        ) from error
    for stack in stacks:
        if stack.first <= layer < stack.first + stack.layers:
            return stack_of(stack.owner), layer - stack.first
    raise BadCheckpoint("the record names a decoder layer that the config does not have", layer=layer)


def fill(
    model: PreTrainedModel,
    tensors: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    file: Any = None,
) -> None:
    """Give parameters of an empty model their values, through transformers' own weight conversion.

    Args:
        model: parameters on meta.
        tensors: by their names on disk.
        dtype: of the parameters.
        device: where they go.
        file: for messages.

    Raises:
        BadCheckpoint: tensors of a wrong shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        device_map={"": torch.device(device)},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    if info.mismatched_keys or info.conversion_errors:
        wrong = [*map(str, info.mismatched_keys), *map(str, info.conversion_errors)]
        raise BadCheckpoint(
            f"{len(wrong)} tensors do not fit the model: {', '.join(wrong[:8])}", file=file, hint="see `moekit check`"
        )
