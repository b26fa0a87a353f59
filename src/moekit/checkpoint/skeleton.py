"""A model without weights: parameters have shapes but no memory, what is computed from the config is there."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from moekit.checkpoint.meta import model_config
from moekit.checkpoint.uneven import uneven_counts, with_counts

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from moekit.checkpoint.folder import Checkpoint


def empty_model(source: Checkpoint | PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a model whose parameters lie on the meta device; buffers, such as rotary frequencies, are real.

    Args:
        source: an opened checkpoint, or a transformers config.
        dtype: of the parameters; None as the config says.

    Raises:
        BadCheckpoint: the config contradicts itself.
        UnsupportedModel: transformers has no causal language model of this type.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, PreTrainedConfig
    from transformers.initialization import no_init_weights

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        remote = False if isinstance(source, PreTrainedConfig) else source.remote_code
        kind = {} if dtype is None else {"dtype": dtype}
        # Drawing weights that have no memory takes far longer than building the model.
        with warnings.catch_warnings(), init_empty_weights(include_buffers=False), no_init_weights():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=remote, **kind)
        _fill_buffers(model, model)
        model.tie_weights(recompute_mapping=False)
        return model.eval()

    if isinstance(source, PreTrainedConfig):
        return build(source)
    return with_counts(build(model_config(source)), uneven_counts(source), build)


def _fill_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Let each model initialise those of its modules that hold buffers: these are real, and no checkpoint has all."""
    import torch
    from transformers import PreTrainedModel

    for child in module.children():
        _fill_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    if any(buffer is not None for buffer in module._buffers.values()):
        with torch.no_grad():
            owner._init_weights(module)
