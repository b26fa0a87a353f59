"""What names say: tensors by layer and expert, and a config's keys by the words that families use for E and K.

Legend: E experts of a layer, K choices a token.
"""

from __future__ import annotations

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


def in_mtp_stack(name: str) -> bool:
    """Whether a tensor belongs to a stack of multi-token-prediction layers beside the decoder's."""
    return bool(_MTP.search(name))


def is_part_tensor(name: str) -> bool:
    """Whether a tensor of a live model belongs to an attached runtime part, not to the stock model."""
    return f"{PARTS}." in name


def where(name: str) -> tuple[int | None, int | None]:
    """Decoder layer and expert that a tensor name belongs to; layers of a multi-token-prediction stack are none."""
    layer = None if in_mtp_stack(name) else re.search(r"\.layers\.(\d+)\.|^layers\.(\d+)\.", name)
    expert = re.search(r"\.experts\.(\d+)\.", name)
    return (
        int(layer.group(1) or layer.group(2)) if layer else None,
        int(expert.group(1)) if expert else None,
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config (multimodal ones nest it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "hidden_size" not in config else config


def stated_experts(config: Mapping[str, Any]) -> int | None:
    """E as a parsed config says it, by whichever name the family gives it."""
    values = text_config(config)
    return next((values[key] for key in EXPERT_COUNT_KEYS if isinstance(values.get(key), int)), None)


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
