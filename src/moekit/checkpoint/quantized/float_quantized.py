"""compressed-tensors, `float-quantized` and `int-quantized`: eight bits a number, scaled by row, block or tensor.

`x.weight` [N, K] in F8_E4M3 or I8 beside `x.weight_scale`: [N, 1] for rows (channels), [1] for all, [N / b, K / c] for
blocks (`strategy: block`, `block_structure: [b, c]`), [N, K / g] for groups of g columns.

By hand: a row 1, -2, 4 with scale 0.25 is 0.25, -0.5, 1.

Legend: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.quantized.base import (
    SCALE,
    WEIGHT,
    WIDE,
    Beside,
    Format,
    Packed,
    ceil_div,
    demand_dtype,
    unreadable,
    wrong_shape,
)
from moekit.checkpoint.quantized.fp8 import EIGHT_BITS, scaled_blocks, widened
from moekit.checkpoint.quantized.packed_ints import scheme_of


class FloatQuantized(Format):
    """Weights of eight bits under their own names.

    Args:
        settings: with `config_groups`.
    """

    ending = ".weight"
    plain_ending = ".weight"
    beside = (Beside(SCALE, (".weight_scale",)),)

    def holds(self, info: TensorInfo) -> bool:
        """Whether it is a weight in eight bits."""
        return info.name.endswith(self.ending) and (info.dtype in EIGHT_BITS or info.dtype == "I8")

    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """The shape is the weight's own."""
        weight, scale = parts[WEIGHT], parts[SCALE]
        demand_dtype(scale, WIDE)
        if len(weight.shape) != 2:
            raise wrong_shape(weight, (weight.shape[0] if weight.shape else 1, 1))
        scheme = scheme_of(self.settings, name)
        if not scheme.get("symmetric", True):
            raise unreadable(f"{weight.name} has zero points beside eight-bit numbers")
        (rows, columns), strategy = weight.shape, scheme.get("strategy") or "tensor"
        block = _block(strategy, scheme, rows, columns)
        grid = ceil_div(rows, block[0]), ceil_div(columns, block[1])
        fitting: list[tuple[int, ...]] = [grid]
        fitting += [(rows,)] if strategy in ("channel", "token") else []
        fitting += [(1,), ()] if grid == (1, 1) else []
        if scale.shape not in fitting:
            raise wrong_shape(scale, *fitting[:2])
        return Packed(name, parts, weight.shape, facts={"block": block, "grid": grid})

    def unpack(self, packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Eight bits times scale."""
        weight = parts[WEIGHT]
        weight_NK = weight.float() if weight.dtype == torch.int8 else widened(weight)
        return scaled_blocks(weight_NK, parts[SCALE].float().reshape(packed.facts["grid"]), packed.facts["block"])


def _block(strategy: str, scheme: Mapping[str, object], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    told, group = scheme.get("block_structure"), scheme.get("group_size")
    if strategy == "block" and isinstance(told, list | tuple) and len(told) == 2 and all(type(n) is int for n in told):
        return int(told[0]), int(told[1])
    if strategy == "group" and isinstance(group, int) and group > 0:
        return 1, group
    if strategy in ("channel", "token"):
        return 1, columns
    if strategy == "tensor":
        return rows, columns
    raise unreadable(f"scales are given by {strategy!r}")
