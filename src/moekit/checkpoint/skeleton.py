"""A model without weights: parameters have shapes but no memory, what is computed from the config is there."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from moekit.checkpoint.architecture import architecture_of
from moekit.checkpoint.meta import architecture, model_config
from moekit.checkpoint.uneven import uneven_counts, with_counts

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from moekit.checkpoint.architecture import Architecture
    from moekit.checkpoint.folder import Checkpoint


def empty_model(
    source: Checkpoint | PreTrainedConfig,
    dtype: torch.dtype | None = None,
    *,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Build a model whose parameters lie on the meta device; buffers, such as rotary frequencies, are real.

    Args:
        source: an opened checkpoint, or a transformers config alone.
        dtype: of the parameters; None as the config says.
        config: of the model, where it is not the checkpoint's own: class and numbers of experts are the checkpoint's.

    Raises:
        BadCheckpoint: the config contradicts itself.
        UnsupportedModel: transformers has no class of this type that writes text.
    """
    from transformers import PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return _built(architecture_of(source), source, dtype)
    made, own = architecture(source), config or model_config(source)

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        return _built(made, config, dtype)

    return with_counts(build(own), uneven_counts(source), build)


def _built(made: Architecture, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    # Drawing weights that have no memory takes far longer than building the model.
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False), no_init_weights():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = made.build(config, dtype)
    _fill_buffers(model, model)
    model.tie_weights(recompute_mapping=False)
    return model.eval()


def _fill_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Let each model initialise those of its modules that hold buffers: these are real, and no checkpoint has all."""
    import torch
    from transformers import PreTrainedModel

    for child in module.children():
        _fill_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    if any(buffer is not None for buffer in module._buffers.values()):
        with torch.no_grad():
            owner._init_weights(module)
