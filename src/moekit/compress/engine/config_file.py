"""Names of experts in a config.json that must follow when experts are renumbered."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_EXPERT = re.compile(r"^(?P<head>(?P<layer>.*layers\.\d+\.).*experts\.)(?P<expert>\d+)(?P<tail>(?:\..*)?)$")


def renamed_experts(value: Any, rename: Callable[[str, int], int | None]) -> Any:
    """A part of a config in which names of single experts follow; entries of experts that are gone are left out.

    Quantized checkpoints list modules that are stored in full precision, an expert's among them.

    Args:
        value: lists, mappings and strings.
        rename: beginning of a layer's names ("model.layers.3."), expert -> its new number, None if it is gone.
    """
    if isinstance(value, str):
        match = _EXPERT.match(value)
        if match is None:
            return value
        new = rename(match["layer"], int(match["expert"]))
        return None if new is None else f"{match['head']}{new}{match['tail']}"
    if isinstance(value, list):
        followed = [(item, renamed_experts(item, rename)) for item in value]
        return [new for old, new in followed if new is not None or old is None]
    if isinstance(value, dict):
        named = ((renamed_experts(key, rename), renamed_experts(item, rename)) for key, item in value.items())
        return {key: item for key, item in named if key is not None}
    return value
