"""Build a config's model on the meta device, where tensors have shapes but no memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.architecture import Architecture, architecture_of, named_class
from moekit.checkpoint.names import EXPERT_COUNT_KEYS
from moekit.checkpoint.safety import newer_transformers
from moekit.checkpoint.uneven import uneven_counts, with_counts
from moekit.errors import BadCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from moekit.checkpoint.folder import Checkpoint


def _bounded(checkpoint: Checkpoint) -> None:
    """Refuse counts that no tensor backs, so that a hostile config cannot make us build a billion layers."""
    largest = max((size for info in checkpoint.tensors.values() for size in info.shape[:1]), default=0)
    bound = max(len(checkpoint.tensors), largest)
    for part in _parts(checkpoint.config):
        for key in ("num_hidden_layers", "depth", *EXPERT_COUNT_KEYS):
            value = part.get(key)
            if isinstance(value, int) and value > bound:
                raise BadCheckpoint(
                    f"{key} is {value}, far more than the {len(checkpoint.tensors)} tensors can hold",
                    file=checkpoint.path / "config.json",
                    hint="the config belongs to another model",
                )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config, and the configs of towers and language models in it."""
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    return [config, *(part for value in nested for part in _parts(value))]


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers config of a checkpoint, its quantization left out.

    Raises:
        BadCheckpoint: the config contradicts itself.
        UnsupportedModel: transformers has no class of this type that writes text.
    """
    config, _ = _known(checkpoint)
    return config


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The class that a checkpoint is.

    Raises:
        BadCheckpoint, UnsupportedModel: see `model_config`.
    """
    return _known(checkpoint)[1]


def _known(checkpoint: Checkpoint) -> tuple[PreTrainedConfig, Architecture]:
    from transformers import AutoConfig

    _bounded(checkpoint)
    file = checkpoint.path / "config.json"
    _refuse_unknown_parts(checkpoint)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=checkpoint.remote_code
        )
    except Exception as error:  # a config can fail in as many ways as there are families
        raise _no_model(checkpoint, error) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, architecture_of(config, remote=checkpoint.remote_code, file=file)


def _refuse_unknown_parts(checkpoint: Checkpoint) -> None:
    """A multimodal model is made of models: each must be of a type that transformers knows."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    kind: Any = (
        CONFIG_MAPPING_NAMES.get(checkpoint.config.get("model_type", ""))
        and CONFIG_MAPPING[checkpoint.config["model_type"]]
    )
    for key, made_of in (getattr(kind, "sub_configs", None) or {}).items():
        part = checkpoint.config.get(key)
        name = part.get("model_type") if isinstance(part, Mapping) else None
        if made_of is transformers.AutoConfig and isinstance(name, str) and name not in CONFIG_MAPPING_NAMES:
            raise UnsupportedModel(
                f"transformers {transformers.__version__} knows no model type {name!r}, of which the {key} is",
                file=checkpoint.path / "config.json",
                hint=newer_transformers(checkpoint.config) or "a newer transformers may know it",
            )


def _no_model(checkpoint: Checkpoint, error: Exception) -> BadCheckpoint:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BadCheckpoint(
        f"no model can be built from this config: {reason}",
        file=checkpoint.path / "config.json",
        hint="compare it with the original's config",
    )


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build a checkpoint's model without memory.

    Raises:
        BadCheckpoint: the config contradicts itself.
        UnsupportedModel: transformers has no class of this type that writes text.
    """
    config, found = _known(checkpoint)
    return _built(checkpoint, config, found.build)


def stated_model(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """Build the class that the config names, without memory.

    Returns:
        None where that is the class that the checkpoint is opened as, no class of transformers, or one that cannot be
        built here.
    """
    config, found = _known(checkpoint)
    named: Any = named_class(config)
    if named is None or named is found.kind:
        return None
    try:
        return _built(checkpoint, config, named._from_config)
    except (BadCheckpoint, UnsupportedModel):  # such as a library that is not installed
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
    except (BadCheckpoint, UnsupportedModel):
        raise
    except ImportError as error:
        raise UnsupportedModel(
            f"a library that this model needs is missing: {str(error).strip().splitlines()[0]}",
            file=checkpoint.path / "config.json",
            hint="install it, then try again",
        ) from error
    except Exception as error:
        raise _no_model(checkpoint, error) from error
