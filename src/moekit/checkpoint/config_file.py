"""Edit config.json: only the keys that must change, all others, known or not, stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.names import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# How families say how many multi-token-prediction layers follow the decoder's.
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def edited_config(
    raw: Mapping[str, Any], before: PreTrainedConfig, after: PreTrainedConfig, *, keep: Collection[str] = ()
) -> dict[str, Any]:
    """A parsed config.json with what differs between two transformers configs changed, and nothing else.

    A family may know a key by several names; those that the file uses are changed.

    Args:
        raw: parsed config.json.
        before: its transformers config.
        after: what it is to become.
        keep: keys that stay as the file has them, in parts of it too.
    """
    return _merged(raw, before.to_dict(), after.to_dict(), before, keep)


def _merged(
    raw: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], config: Any, keep: Collection[str]
) -> dict[str, Any]:
    merged = dict(raw)
    for key, value in after.items():
        if value == before.get(key) or key in keep:
            continue
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            merged[key] = _merged(raw[key], before.get(key) or {}, value, getattr(config, key, None), keep)
            continue
        names = [name for name in _aliases(key, config) if name in raw] or [key]
        merged.update(dict.fromkeys(names, value))
    return merged


def _aliases(key: str, config: Any) -> list[str]:
    """All names of a key."""
    named: Mapping[str, str] = getattr(config, "attribute_map", None) or {}
    true = named.get(key, key)
    return list(dict.fromkeys([key, true, *(alias for alias, target in named.items() if target == true)]))


def announced_mtp(raw: Mapping[str, Any]) -> int:
    """How many multi-token-prediction layers a parsed config.json announces."""
    parts = (raw, text_config(raw))
    found = (part.get(key) for part in parts for key in MTP_KEYS)
    return max((n for n in found if isinstance(n, int) and not isinstance(n, bool)), default=0)


def without_mtp(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json that announces no multi-token-prediction layers."""
    merged = copy.deepcopy(dict(raw))
    inner: Any = text_config(merged)
    for values in (merged, inner):
        for key in MTP_KEYS:
            if isinstance(values.get(key), int):
                values[key] = 0
    return merged
