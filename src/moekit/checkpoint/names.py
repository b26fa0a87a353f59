"""What names say: tensors by layer and expert, and a config's keys by the words that families use for E and K.

Legend: E experts of a layer, K choices a token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

# The names that families give to E.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Names that families give to K; the first present one counts.
TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token", "top_k_experts", "moe_topk")

# Child module that `moekit.runtime` hangs below a router, experts, a block or the base model: no stock tensor.
PARTS = "moekit_parts"

# Stacks of multi-token prediction beside the decoder's, numbered from 0 again.
_MTP = re.compile(r"(?:^|\.)mtp(?:[._]|$)")

# An expert's number among the experts of a block: "experts.3.", and "experts.expert_3." of a dictionary of modules.
EXPERT_NUMBER = r"\.experts\.(?:expert_)?(\d+)\."
_EXPERT = re.compile(EXPERT_NUMBER)

# Of two stacks that both number their layers, a name alone does not say which number is meant.
_TWO_STACKS = re.compile(r"(?:^|\.)(?:encoder|decoder)\.(?:layers|blocks?)\.")

# What modules that are no decoder of text are called, by those who have them beside one.
_TOWER = re.compile(r"vision|visual|vit\b|image|audio|speech|tower|talker|code2wav|projector|resampler")


def in_mtp_stack(name: str) -> bool:
    """Whether a tensor belongs to a stack of multi-token-prediction layers beside the decoder's."""
    return bool(_MTP.search(name))


def is_part_tensor(name: str) -> bool:
    """Whether a tensor of a live model belongs to an attached runtime part, not to the stock model."""
    return f"{PARTS}." in name


def in_tower(name: str) -> bool:
    """Whether a name says that a module or tensor is part of a vision or audio tower, or of a second decoder."""
    return bool(_TOWER.search(re.split(r"\.\d+\.", name, maxsplit=1)[0]))


def where(name: str) -> tuple[int | None, int | None]:
    """Decoder layer and expert that a tensor name belongs to; layers of a multi-token-prediction stack are none.

    By the name alone, where no model can be asked: see `Checkpoint.where`.
    """
    aside = in_mtp_stack(name) or in_tower(name) or _TWO_STACKS.search(name)
    layer = None if aside else re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name)
    return int(layer.group(1)) if layer else None, expert_in(name)


def expert_in(name: str) -> int | None:
    """Number of the expert that a tensor name belongs to; None for tensors of all experts, or of none."""
    found = _EXPERT.search(name)
    return int(found.group(1)) if found else None


def text_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that lead to the language model's part of a config; empty where it is the config itself."""
    nested = [key for key, value in config.items() if isinstance(value, Mapping)]
    if not nested:
        return ()
    found = _path_of(str(config.get("model_type")))
    if found is None and "num_hidden_layers" not in config:
        # A type that transformers does not know: the one part that has a vocabulary and layers.
        texts = [key for key in nested if {"vocab_size", "num_hidden_layers"} <= config[key].keys()]
        found = (texts[0],) if len(texts) == 1 else ("text_config",)
    values: Any = config
    for key in found or ():
        values = values.get(key)
        if not isinstance(values, Mapping):
            return ()
    return found or ()


@functools.lru_cache(maxsize=64)
def _path_of(model_type: str) -> tuple[str, ...] | None:
    """Where the config of a model type keeps its language model's, as transformers says; None if it does not."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config: Any = CONFIG_MAPPING[model_type]()
        text = config.get_text_config()
    except Exception:  # unknown types, defaults that do not fit, several language models
        return None
    return _path_to(config, text)


def _path_to(config: Any, text: Any) -> tuple[str, ...] | None:
    if config is text:
        return ()
    for key in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, key, None)
        below = None if part is None else _path_to(part, text)
        if below is not None:
            return (key, *below)
    return None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a parsed config.json (multimodal ones nest it, under names of their own)."""
    values: Any = config
    for key in text_path(config):
        values = values[key]
    part: Mapping[str, Any] = values
    return part


def with_text_config(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json whose language model's part is another one."""
    return _put(config, text_path(config), text)


def _put(config: Mapping[str, Any], path: tuple[str, ...], part: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, path[0]: _put(config[path[0]], path[1:], part)} if path else dict(part)


def stated_experts(config: Mapping[str, Any]) -> int | None:
    """E as a parsed config says it, by whichever name the family gives it."""
    values = text_config(config)
    return next((values[key] for key in EXPERT_COUNT_KEYS if isinstance(values.get(key), int)), None)


def stated_depth(config: Mapping[str, Any]) -> int | None:
    """Decoder layers as a parsed config says it, behind which those of multi-token prediction follow.

    None where it does not, or where an encoder's are numbered before them: nothing follows these.
    """
    values = text_config(config)
    layers = values.get("num_hidden_layers")
    return layers if isinstance(layers, int) and not values.get("is_encoder_decoder") else None


def config_top_k(config: Mapping[str, Any]) -> int | None:
    """K as a parsed config says it, by whichever name the family gives it."""
    inner = text_config(config)
    return next((inner[key] for key in TOP_K_KEYS if isinstance(inner.get(key), int)), None)


def config_groups(config: Mapping[str, Any]) -> tuple[int, int]:
    """Groups of neighbouring experts that a router chooses among first, and how many it takes; (1, 1) without."""
    inner = text_config(config)
    groups = next((inner[key] for key in ("n_group", "num_expert_group") if isinstance(inner.get(key), int)), 1) or 1
    allowed = inner.get("topk_group")
    return groups, allowed if isinstance(allowed, int) and allowed > 0 else 1
