"""Count the experts of a checkpoint from names and shapes alone (a small part of what `anatomy.layout` knows)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moekit.checkpoint.names import in_mtp_stack, in_tower, stated_depth, where
from moekit.checkpoint.safety import TensorInfo

if TYPE_CHECKING:
    from moekit.checkpoint.folder import Checkpoint

_SPLIT = re.compile(r"(?:^|\.)(?:layers|blocks?)\.(\d+)\.(?:.*\.)?experts\.(?:expert_)?(\d+)\.")
_ENCODER = re.compile(r"(?:^|\.)encoder\.(?:layers|blocks?)\.(\d+)\.")
_DECODER = re.compile(r"(?:^|\.)decoder\.(?:layers|blocks?)\.\d+\.")
# Stacked experts: [E, ..] tensors of at least three axes, named so by transformers, by Granite and by Step.
_STACKED = re.compile(
    r"(?:^|\.)(?:layers|blocks)\.(\d+)\.(?:.*\.)?"
    r"(?:experts\.\w+(?:\.weight)?|(?:in|out)put_linear\.weight|moe\.(?:gate|up|down)_proj\.weight)$"
)


def expert_counts(tensors: Mapping[str, TensorInfo], *, stacks: bool = False) -> dict[int, int]:
    """Decoder layer -> routed experts that have tensors, by their names alone; see `counts_of`.

    Args:
        tensors: by name.
        stacks: whether layers of a multi-token-prediction stack count too, by their own numbers.
    """
    split: dict[int, set[int]] = defaultdict(set)
    stacked: dict[int, int] = {}
    # An encoder's layers are numbered before the decoder's.
    before = max((int(match[1]) + 1 for name in tensors if (match := _ENCODER.search(name))), default=0)
    for name, info in tensors.items():
        if (in_mtp_stack(name) and not stacks) or in_tower(name):
            continue
        first = before if _DECODER.search(name) else 0
        if match := _SPLIT.search(name):
            split[first + int(match.group(1))].add(int(match.group(2)))
        elif (match := _STACKED.search(name)) and len(info.shape) >= 3:
            stacked[first + int(match.group(1))] = info.shape[0]
    return dict(sorted((stacked | {layer: len(experts) for layer, experts in split.items()}).items()))


def is_expert_tensor(name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    return bool(_SPLIT.search(name) or _STACKED.search(name))


def stacked_experts(info: TensorInfo) -> int | None:
    """How many experts a tensor stacks along its first axis; None for any other tensor."""
    stacks = _STACKED.search(info.name) and not _SPLIT.search(info.name) and len(info.shape) >= 2
    return info.shape[0] if stacks else None


def counts_of(checkpoint: Checkpoint) -> dict[int, int]:
    """Decoder layer -> routed experts that have tensors, as its class says which tensors are theirs.

    Layers of multi-token prediction that follow the decoder's last one count too, those of a stack beside it do not.
    """
    layout = checkpoint.known_layout
    if layout is None:
        return expert_counts(checkpoint.tensors)
    split: dict[int, set[int]] = defaultdict(set)
    stacked: dict[int, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = layout.layer(name)
        if layer is None or not layout.is_expert(name):
            continue
        if (expert := where(name)[1]) is not None:
            split[layer].add(expert)
        elif len(info.shape) >= 3:
            stacked[layer] = info.shape[0]
    return dict(sorted((stacked | {layer: len(experts) for layer, experts in split.items()}).items()))


def mtp_tensors(checkpoint: Checkpoint) -> set[str]:
    """Names that belong to multi-token-prediction layers: after the decoder's last one, or in a stack of their own."""
    layers = stated_depth(checkpoint.config)
    found = {name for name in checkpoint.tensors if in_mtp_stack(name)}
    if layers is None:
        return found
    numbers = ((name, checkpoint.where(name)[0]) for name in checkpoint.tensors)
    return found | {name for name, layer in numbers if layer is not None and layer >= layers}
