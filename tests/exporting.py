"""Folders whose experts lie on symmetric grids, width by width as a test wants, with the record that tells of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.model import save
from moekit.checkpoint.record import Record
from moekit.compress.engine.resize import read_block
from moekit.compress.maths.rounding import round_to_nearest
from moekit.compress.weights import to_storage
from tests.families import EXPERTS, build
from tests.tiny import tokenizer

PARTS = ("gate", "up", "down")
# Sizes that packed forms hold: multiples of 32.
SIZES: dict[str, dict[str, int]] = {"mixtral": {"intermediate_size": 64}, "olmoe": {"intermediate_size": 64}}
SIZE = {"moe_intermediate_size": 64}

Bits = Callable[[int, str, int], int | None]


def rounded(
    folder: Path,
    family: str,
    bits: Bits | int,
    *,
    group: int = 32,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    **overrides: Any,
) -> Path:
    """A tiny model whose experts are rounded, as `moekit quantize` writes it.

    Args:
        folder: to write.
        family: of the model.
        bits: of all matrices, or (layer, part, expert) -> bits, None for a layer that stays.
        group: inputs that share a scale.
        dtype: that it is stored in.
        fused: whether experts are stacked on disk.
        overrides: of the config.
    """
    how: Bits = bits if callable(bits) else lambda layer, part, expert: bits
    sizes = {"hidden_size": 64, **SIZES.get(family, SIZE), **overrides}
    model = build(family, **sizes).to(dtype)
    told: dict[int, dict[str, list[int]]] = {}
    for layer in find_moe_layers(model):
        weights = read_block(layer)
        widths = {part: [how(layer.index, part, e) for e in range(EXPERTS)] for part in PARTS}
        if None in widths["gate"]:
            continue  # the whole layer stays
        told[layer.index] = {part: [int(n or 0) for n in some] for part, some in widths.items()}
        for part, stack in zip(PARTS, (weights.gate_EIH, weights.up_EIH, weights.down_EHI), strict=True):
            assert stack is not None
            for e in range(EXPERTS):
                stack[e] = round_to_nearest(stack[e], told[layer.index][part][e], group, symmetric=True)
        with torch.no_grad():
            for name, value in to_storage(weights, layer.storage).items():
                layer.experts.get_parameter(name).copy_(value)
    if fused:
        model.save_pretrained(folder, save_original_format=False)
    scores = {"grids": {"group": group, "symmetric": True, "bits": told}}
    if fused:
        Record(command="a test", scores=scores).write(folder)
        tokenizer().save_pretrained(folder)
    else:
        save(model, folder, tokenizer=tokenizer(), record=Record(command="a test", scores=scores))
    return folder
