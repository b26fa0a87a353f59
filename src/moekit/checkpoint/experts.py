"""Count the experts of a checkpoint from names and shapes alone (a small part of what `anatomy.layout` knows)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from moekit.checkpoint.names import in_mtp_stack, text_config, where
from moekit.checkpoint.safety import TensorInfo

_SPLIT = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?experts\.(\d+)\.")
# Stacked experts: [E, ..] tensors of at least three axes, named so by transformers or by Granite.
_STACKED = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?(?:experts\.\w+|(?:in|out)put_linear\.weight)$")


def expert_counts(tensors: Mapping[str, TensorInfo], *, stacks: bool = False) -> dict[int, int]:
    """Decoder layer -> routed experts that have tensors.

    Args:
        tensors: by name.
        stacks: whether layers of a multi-token-prediction stack count too, by their own numbers.
    """
    split: dict[int, set[int]] = defaultdict(set)
    stacked: dict[int, int] = {}
    for name, info in tensors.items():
        if in_mtp_stack(name) and not stacks:
            continue
        if match := _SPLIT.search(name):
            split[int(match.group(1))].add(int(match.group(2)))
        elif (match := _STACKED.search(name)) and len(info.shape) >= 3:
            stacked[int(match.group(1))] = info.shape[0]
    return dict(sorted((stacked | {layer: len(experts) for layer, experts in split.items()}).items()))


def is_expert_tensor(name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    return bool(_SPLIT.search(name) or _STACKED.search(name))


def stacked_experts(info: TensorInfo) -> int | None:
    """How many experts a tensor stacks along its first axis; None for any other tensor."""
    stacks = _STACKED.search(info.name) and not _SPLIT.search(info.name) and len(info.shape) >= 2
    return info.shape[0] if stacks else None


def mtp_tensors(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> set[str]:
    """Names that belong to multi-token-prediction layers: after the decoder's last one, or in a stack of their own.

    Args:
        tensors: of a checkpoint, by name.
        config: its parsed config.json.
    """
    layers = text_config(config).get("num_hidden_layers")
    # Towers number their layers too: only the stack that holds experts goes on beyond the decoder's end.
    decoder = {match.group(0).rpartition("layers.")[0] for name in tensors if (match := _place(name))}
    found = {name for name in tensors if in_mtp_stack(name)}
    for name in tensors:
        layer = where(name)[0]
        if layer is not None and isinstance(layers, int) and layer >= layers:
            found |= {name} if name[: name.index("layers.")] in decoder else set()
    return found


def _place(name: str) -> re.Match[str] | None:
    """Where the name of an expert's tensor says its layer."""
    return re.match(r"(?:.*?\.)?layers\.\d+\.", name) if is_expert_tensor(name) else None
