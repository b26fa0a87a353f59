"""A model without weights: parameters have shapes but no memory, what is computed from the config is there."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from moekit.checkpoint.meta import model_config
from moekit.checkpoint.uneven import uneven_counts, with_counts

if TYPE_CHECKING:
    import torch
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

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        remote = False if isinstance(source, PreTrainedConfig) else source.remote_code
        kind = {} if dtype is None else {"dtype": dtype}
        with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=remote, **kind)
        return model.eval()

    if isinstance(source, PreTrainedConfig):
        return build(source)
    return with_counts(build(model_config(source)), uneven_counts(source), build)
