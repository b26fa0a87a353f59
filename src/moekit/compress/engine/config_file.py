"""Edit config.json: only the keys that must change, all others, known or not, stay as they are."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.names import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_EXPERT = re.compile(r"^(?P<head>.*layers\.(?P<layer>\d+)\..*experts\.)(?P<expert>\d+)(?P<tail>(?:\..*)?)$")


def edited_config(raw: Mapping[str, Any], before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, Any]:
    """A parsed config.json with what differs between two transformers configs changed, and nothing else.

    A family may know a key by several names; those that the file uses are changed.

    Args:
        raw: parsed config.json.
        before: its transformers config.
        after: what it is to become.
    """
    return _merged(raw, before.to_dict(), after.to_dict(), before)


def _merged(raw: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], config: Any) -> dict[str, Any]:
    merged = dict(raw)
    for key, value in after.items():
        if value == before.get(key):
            continue
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            merged[key] = _merged(raw[key], before.get(key) or {}, value, getattr(config, key, None))
            continue
        names = [name for name in _aliases(key, config) if name in raw] or [key]
        merged.update(dict.fromkeys(names, value))
    return merged


def _aliases(key: str, config: Any) -> list[str]:
    """All names of a key."""
    named: Mapping[str, str] = getattr(config, "attribute_map", None) or {}
    true = named.get(key, key)
    return list(dict.fromkeys([key, true, *(alias for alias, target in named.items() if target == true)]))


def without_mtp(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json that announces no multi-token-prediction layers."""
    merged = copy.deepcopy(dict(raw))
    inner: Any = text_config(merged)
    for values in (merged, inner):
        for key in _MTP_KEYS:
            if isinstance(values.get(key), int):
                values[key] = 0
    return merged


def renamed_experts(value: Any, rename: Callable[[int, int], int | None]) -> Any:
    """A part of a config in which names of single experts follow; entries of experts that are gone are left out.

    Quantized checkpoints list modules that are stored in full precision, an expert's among them.

    Args:
        value: lists, mappings and strings.
        rename: decoder layer, expert -> its new number, None if it is gone.
    """
    if isinstance(value, str):
        match = _EXPERT.match(value)
        if match is None:
            return value
        new = rename(int(match["layer"]), int(match["expert"]))
        return None if new is None else f"{match['head']}{new}{match['tail']}"
    if isinstance(value, list):
        followed = [(item, renamed_experts(item, rename)) for item in value]
        return [new for old, new in followed if new is not None or old is None]
    if isinstance(value, dict):
        named = ((renamed_experts(key, rename), renamed_experts(item, rename)) for key, item in value.items())
        return {key: item for key, item in named if key is not None}
    return value
