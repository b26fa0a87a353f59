"""Refuse configs that no router can follow, and scales that are announced but not there, as a folder is opened.

Stock code runs with some of them: a model that chooses no expert, or takes the raw bytes of an fp8 weight for numbers,
answers without an error and means nothing.

Legend: E experts of a layer, K choices a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, TOP_K_KEYS, text_config, where
from moekit.errors import BadCheckpoint

_GROUP_KEYS = ("n_group", "num_expert_group")
# What a weight's scale is called: x.weight_scale_inv, x.scale, x_scale_inv; scales of activations are no help to it.
_SCALE = re.compile(r"(?:[._:]weight)?[._:]scales?(?:_inv)?(?:_\d+)?$")


def check_config(config: Mapping[str, Any], file: str | Path) -> None:
    """Refuse numbers of choices and groups that are impossible for the number of experts.

    Args:
        config: parsed config.json; one without routed experts is fine.
        file: for the message.

    Raises:
        BadCheckpoint: naming the key and the nearest legal value.
    """
    values = text_config(config)
    expert_key, experts = _first(values, EXPERT_COUNT_KEYS)
    if experts is None or experts == 0:  # 0: families that are dense without experts
        return
    if experts < 0:
        raise _impossible(file, f"{expert_key} is {experts}", "1")
    key, top_k = _first(values, TOP_K_KEYS)
    if top_k is not None and not 1 <= top_k <= experts:
        what = "a token chooses no expert" if top_k < 1 else f"there are {experts} experts"
        raise _impossible(file, f"{key} is {top_k}, but {what}", str(min(max(top_k, 1), experts)))
    group_key, groups = _first(values, _GROUP_KEYS)
    if groups is None or values.get("topk_method") == "greedy":
        return
    if groups < 1 or experts % groups:
        near = min((n for n in range(1, experts + 1) if experts % n == 0), key=lambda n: abs(n - groups))
        raise _impossible(file, f"{group_key} is {groups}, which does not divide {experts} experts", str(near))
    allowed = values.get("topk_group")
    if isinstance(allowed, int) and not 1 <= allowed <= groups:
        near = min(max(allowed, 1), groups)
        raise _impossible(file, f"topk_group is {allowed}, but there are {groups} groups", str(near))


def _first(values: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int | None]:
    return next(((key, values[key]) for key in keys if isinstance(values.get(key), int)), ("", None))


def _impossible(file: str | Path, what: str, nearest: str) -> BadCheckpoint:
    return BadCheckpoint(
        what, file=file, hint=f"the nearest legal value is {nearest}; compare the config with the original's"
    )


def check_scales(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: str | Path) -> None:
    """Refuse weights in eight bits whose scales are not there.

    Args:
        config: parsed config.json; without a `quantization_config` nothing is announced, and `verify` refuses them.
        tensors: all of the folder.
        folder: for the message.

    Raises:
        BadCheckpoint: naming the scales.
    """
    if "quantization_config" not in config:
        return
    scaled = {_SCALE.sub("", name) for name in tensors if _SCALE.search(name)}
    bare = [
        name
        for name, info in tensors.items()
        if info.dtype.startswith("F8_") and not _SCALE.search(name) and _stem(name) not in scaled
    ]
    if not bare:
        return
    layer, expert = where(bare[0])
    announced = config["quantization_config"]
    suffix = "_scale_inv" if isinstance(announced, Mapping) and announced.get("quant_method") == "fp8" else "_scale"
    raise BadCheckpoint(
        f"{len(bare)} weights are in eight bits, but their scales are missing: "
        f"{', '.join(f'{name}{suffix}' for name in bare[:8])}{', ...' if len(bare) > 8 else ''}",
        file=folder,
        layer=layer,
        expert=expert,
        hint="fetch the folder again: without its scales such a weight is no number",
    )


def _stem(name: str) -> str:
    return re.sub(r"[._:]weight(?:[._:]\w+)?$", "", name)
