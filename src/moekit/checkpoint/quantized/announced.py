"""Weights that a config says are quantized, and that are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.names import where
from moekit.checkpoint.quantized.base import Packed
from moekit.errors import BadCheckpoint

# Keys under which formats list modules that stay as they are.
_SPARED = ("modules_to_not_convert", "ignore", "ignored_layers")


def refuse_bare(
    kind: str,
    weights: Mapping[str, Packed],
    tensors: Mapping[str, TensorInfo],
    settings: Mapping[str, Any],
    folder: str | Path,
) -> None:
    """Refuse a folder where nothing is packed, or where some weights of a kind are and others are not.

    Engines make room for scales by what the config announces, and then run with scales that nobody filled.

    Args:
        kind: how the config says that weights are quantized.
        weights: packed ones, by name.
        tensors: all, as they are where nothing is quantized.
        settings: the config's `quantization_config`.
        folder: for the message.

    Raises:
        BadCheckpoint: names the tensor, layer and expert.
    """
    if not weights:
        raise BadCheckpoint(
            f"the config says that the weights are quantized ({kind}), but no tensor is, and there are no scales",
            file=folder,
            hint="fetch the folder again, or take quantization_config out of config.json if nothing is quantized",
        )
    kinds, spared = {_kind(name) for name in weights}, _listed(settings)
    for name, info in tensors.items():
        if name in weights or _kind(name) not in kinds:
            continue
        if any(_names(entry, name) for entry in spared) or not _meant(settings, name):
            continue
        layer, expert = where(name)
        raise BadCheckpoint(
            f"the config says that {name} is quantized ({kind}) like others of its kind, but it is {info.dtype} "
            "and has no scales",
            file=folder,
            layer=layer,
            expert=expert,
            hint="fetch the folder again, or list the module in quantization_config (modules_to_not_convert, ignore)",
        )


def _kind(name: str) -> str:
    """A tensor's name without the numbers of layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _listed(settings: Mapping[str, Any]) -> list[str]:
    """Modules that stay as they are."""
    listed = [entry for key in _SPARED for entry in settings.get(key) or [] if isinstance(entry, str)]
    rules = settings.get("dynamic")
    dynamic = [key.removeprefix("-:") for key in rules if key.startswith("-:")] if isinstance(rules, Mapping) else []
    return listed + [f"re:.*{rule}" for rule in dynamic]


def _meant(settings: Mapping[str, Any], name: str) -> bool:
    """Whether the groups of compressed-tensors mean a tensor: by a class of modules, or by its path."""
    groups = settings.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    targets = [str(target) for group in groups for target in group.get("targets") or []]
    by_class = not targets or any(":" not in target and "." not in target for target in targets)
    return by_class or any(_names(target, name) for target in targets)


def _names(entry: str, name: str) -> bool:
    """Whether an entry of such a list means a tensor: a path, a part of one, or a pattern after "re:"."""
    pattern = entry.removeprefix("re:") if entry.startswith("re:") else entry.replace("*", r"\d+")
    try:
        found = re.match(pattern, name.rpartition(".")[0]) is not None
    except re.error:
        found = False
    return found or (not entry.startswith("re:") and entry in name)
