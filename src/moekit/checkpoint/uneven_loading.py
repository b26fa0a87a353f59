"""Load a checkpoint whose layers hold different numbers of experts, one layer in memory twice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from moekit.checkpoint.conversions import follow_names
from moekit.checkpoint.precision import reading_dtype
from moekit.checkpoint.quantized.weights import WeightReader
from moekit.checkpoint.tying import tie
from moekit.checkpoint.uneven import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.checkpoint.folder import Checkpoint


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
        groups.setdefault(checkpoint.layout.layer(name), []).append(name)
    with WeightReader(checkpoint, wanted) as reader:
        for names in groups.values():  # one layer at a time is in memory twice
            tensors = {name: reader.weight(name) for name in reader.plain_names(names)}
            fill(model, tensors, dtype=wanted, file=checkpoint.path)
        follow_names(model, reader.plain_names(checkpoint.tensors))
    tie(model)
    if model.can_generate() and (checkpoint.path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    return model, [name for name, tensor in model.state_dict().items() if tensor.is_meta]
