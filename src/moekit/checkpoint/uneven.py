"""Checkpoints whose layers hold different numbers of experts: the config names the largest, the record every layer's.

Stock transformers knows one number for all layers and does not load them; `moekit.load` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moekit.checkpoint.conversions import follow_names
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, stated_experts, text_config, where
from moekit.checkpoint.precision import reading_dtype
from moekit.checkpoint.quantized.weights import WeightReader
from moekit.checkpoint.record import RECORD_FILE
from moekit.checkpoint.tying import tie
from moekit.errors import BadCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from moekit.checkpoint.folder import Checkpoint


def uneven_counts(checkpoint: Checkpoint) -> dict[int, int]:
    """Decoder layer -> E, where the record says that layers differ; empty otherwise.

    Raises:
        BadCheckpoint: a number that the config, which names the largest, does not allow.
    """
    recorded = {} if checkpoint.record is None else checkpoint.record.expectations.experts
    config = text_config(checkpoint.config)
    layers, most = config.get("num_hidden_layers"), stated_experts(checkpoint.config)
    # Multi-token-prediction layers follow the decoder layers on disk.
    counts = {layer: n for layer, n in recorded.items() if not isinstance(layers, int) or layer < layers}
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
    for name, module in model.named_modules():
        layer, _ = where(f"{name}.")
        down = module._parameters.get("down_proj")
        if layer is not None and isinstance(getattr(module, "num_experts", None), int) and down is not None:
            # A module that holds one rank's share says how many the layer has.
            counts[layer] = getattr(module, "experts_in_layer", down.shape[0])
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
    ours, theirs = (_stack(m) for m in (model, other))
    if not 0 <= layer < len(ours):
        raise BadCheckpoint("the record names a decoder layer that the config does not have", layer=layer)
    ours[layer] = theirs[layer]
    for module in ours[layer].modules():
        if hasattr(module, "config"):
            # One object for the whole model: which experts implementation runs is chosen there.
            module.config = model.config.get_text_config()


def _stack(model: Any) -> nn.ModuleList:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise BadCheckpoint(
            f"{type(model).__name__} keeps its decoder layers in no `layers` list, so they cannot differ",
            hint="the record belongs to another model",
        )
    return layers


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


def load_uneven(
    checkpoint: Checkpoint, build: Callable[[torch.dtype | None], PreTrainedModel], dtype: str | torch.dtype
) -> tuple[PreTrainedModel, Iterable[str]]:
    """Load a checkpoint whose layers hold different numbers of experts; quantized weights become floats.

    transformers builds quantized experts with one number for all layers, and so has no way of its own to load them.

    Args:
        checkpoint: opened and verified.
        build: makes its model of a dtype (None as the config says) without weights, counts as the record says.
        dtype: of the weights; "auto" keeps the config's.

    Returns:
        The model, and what did not get weights.

    Raises:
        UnsupportedModel: the weights are quantized in a way that is not read here.
    """
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    given = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if "quantization_config" in checkpoint.config:
        given = reading_dtype(checkpoint, given)
    model = build(given)
    wanted = given or model.config.dtype or torch.float32
    groups: dict[int | None, list[str]] = {}
    for name in checkpoint.tensors:
        groups.setdefault(where(name)[0], []).append(name)
    with WeightReader(checkpoint, wanted) as reader:
        for names in groups.values():  # one layer at a time is in memory twice
            tensors = {name: reader.weight(name) for name in reader.plain_names(names)}
            fill(model, tensors, dtype=wanted, file=checkpoint.path)
        follow_names(model, reader.plain_names(checkpoint.tensors))
    tie(model)
    if model.can_generate() and (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    return model, [name for name, tensor in model.state_dict().items() if tensor.is_meta]
