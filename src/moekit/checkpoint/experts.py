"""Count the experts of a checkpoint from names and shapes alone (a small part of what `anatomy.layout` knows)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from moekit.checkpoint.names import in_mtp_stack
from moekit.checkpoint.safety import TensorInfo

_SPLIT = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?experts\.(\d+)\.")
# Stacked experts: [E, ..] tensors of at least three axes, named so by transformers or by Granite.
_STACKED = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?(?:experts\.\w+|(?:in|out)put_linear\.weight)$")


def expert_counts(tensors: Mapping[str, TensorInfo]) -> dict[int, int]:
    """Decoder layer -> routed experts that have tensors."""
    split: dict[int, set[int]] = defaultdict(set)
    stacked: dict[int, int] = {}
    for name, info in tensors.items():
        if in_mtp_stack(name):
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
