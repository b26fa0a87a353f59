"""Build a config's model on the meta device, where tensors have shapes but no memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.names import EXPERT_COUNT_KEYS, text_config
from moekit.checkpoint.uneven import uneven_counts, with_counts
from moekit.errors import BadCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from moekit.checkpoint.folder import Checkpoint


def _bounded(checkpoint: Checkpoint) -> None:
    """Refuse counts that no tensor backs, so that a hostile config cannot make us build a billion layers."""
    config = text_config(checkpoint.config)
    largest = max((size for info in checkpoint.tensors.values() for size in info.shape[:1]), default=0)
    bound = max(len(checkpoint.tensors), largest)
    for key in ("num_hidden_layers", *EXPERT_COUNT_KEYS):
        value = config.get(key)
        if isinstance(value, int) and value > bound:
            raise BadCheckpoint(
                f"{key} is {value}, far more than the {len(checkpoint.tensors)} tensors can hold",
                file=checkpoint.path / "config.json",
                hint="the config belongs to another model",
            )


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers config of a checkpoint, its quantization left out.

    Raises:
        BadCheckpoint: the config contradicts itself.
        UnsupportedModel: transformers has no causal language model of this type.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    _bounded(checkpoint)
    remote = checkpoint.remote_code
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=remote
        )
    except Exception as error:  # a config can fail in as many ways as there are families
        raise _no_model(checkpoint, error) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise UnsupportedModel(
            f"transformers has no causal language model of type {checkpoint.config.get('model_type')!r}",
            file=checkpoint.path / "config.json",
            hint="moekit works on decoder-only language models",
        )
    return config


def _no_model(checkpoint: Checkpoint, error: Exception) -> BadCheckpoint:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BadCheckpoint(
        f"no model can be built from this config: {reason}",
        file=checkpoint.path / "config.json",
        hint="compare it with the original's config",
    )


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the config's causal language model without memory.

    Raises:
        BadCheckpoint: the config contradicts itself.
        UnsupportedModel: transformers has no causal language model of this type.
    """
    from transformers import AutoModelForCausalLM

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=checkpoint.remote_code)
        return model

    return _built(checkpoint, model_config(checkpoint), build)


def stated_model(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """Build the class that the config names, without memory.

    Returns:
        None where that is the causal language model, no class of transformers, or one that cannot be built here.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    found: Any = kind
    config = model_config(checkpoint)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is found or type(config) is not found.config_class:
        return None
    try:
        return _built(checkpoint, config, found._from_config)
    except BadCheckpoint:  # such as a vision library that is not installed
        return None


def _built(
    checkpoint: Checkpoint, config: PreTrainedConfig, make: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    import torch

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            return make(config)

    try:
        return with_counts(build(config), uneven_counts(checkpoint), build)
    except BadCheckpoint:
        raise
    except Exception as error:
        raise _no_model(checkpoint, error) from error
