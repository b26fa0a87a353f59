"""compressed-tensors, `pack-quantized`: whole numbers of 2, 4 or 8 bits, eight or so in a word, a scale for each group.

`x.weight_packed` [N, ceil(K / P)] holds the numbers of a row one after the other, P = 32 / bits a word, lowest bits
first. What is stored is the number plus 2 ** (bits - 1). `x.weight_scale` is [N, K / g] for groups of g columns, [N, 1]
for rows (channels) or [1] for all; `x.weight_zero_point` [ceil(N / P), groups], there if `symmetric` is false, is
packed in the same way along N; `x.weight_shape` holds N and K. With `actorder: group` columns belong to the groups that
`x.weight_g_idx` names.

By hand, 4 bits: the word 0x0000_00f7 holds 7, 15, 0, ... so -1, 7, -8, ...; with scale 0.5 and zero point 2 the weights
are -1.5, 2.5, -5.

Legend: N rows, K columns, G groups of columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.quantized.base import (
    SCALE,
    WEIGHT,
    WIDE,
    Beside,
    Format,
    Packed,
    broken,
    ceil_div,
    demand_dtype,
    unreadable,
    wrong_shape,
)
from moekit.checkpoint.quantized.words import WHOLE, unpack_words

_ZERO = "zero point"
_ORDER = "order"
_SHAPE = "shape"


class PackedInts(Format):
    """Weights in packed whole numbers.

    Args:
        settings: with `config_groups`.
    """

    ending = ".weight_packed"
    plain_ending = ".weight"
    beside = (
        Beside(SCALE, (".weight_scale",)),
        Beside(_ZERO, (".weight_zero_point",), needed=False),
        Beside(_SHAPE, (".weight_shape",), needed=False),
        Beside(_ORDER, (".weight_g_idx",), needed=False),
    )

    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """The number of columns is what the scales say; `weight_shape` is compared as it is read."""
        scheme = scheme_of(self.settings, name)
        weight, scale = parts[WEIGHT], parts[SCALE]
        demand_dtype(weight, frozenset({"I32"}))
        demand_dtype(scale, WIDE)
        bits, group = scheme.get("num_bits"), scheme.get("group_size")
        if bits not in WHOLE or scheme.get("type", "int") != "int":
            raise unreadable(f"{weight.name} is packed in {bits} bits ({scheme.get('type')})")
        if len(weight.shape) != 2:
            raise wrong_shape(weight, (weight.shape[0] if weight.shape else 1, 1))
        rows, words = weight.shape
        per_word = 32 // bits
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        by_group = scheme.get("strategy") == "group" and isinstance(group, int) and group > 0
        each = int(group or 0) if by_group else 0
        columns = groups * each if each else words * per_word
        if ceil_div(columns, per_word) != words or (scale.shape != (rows, groups) and scale.numel != 1):
            raise wrong_shape(scale, (rows, words * per_word // each if each else 1))
        facts = {"bits": bits, "group": each}
        self._check_zero(parts, scheme, (ceil_div(rows, per_word), groups), facts)
        return Packed(name, parts, (rows, columns), facts=facts)

    @staticmethod
    def _check_zero(
        parts: Mapping[str, TensorInfo], scheme: Mapping[str, Any], fitting: tuple[int, int], facts: dict[str, Any]
    ) -> None:
        zero, weight = parts.get(_ZERO), parts[WEIGHT]
        if scheme.get("symmetric", True):
            return
        if zero is None:
            missing = f"{weight.name.removesuffix('_packed')}_zero_point"
            raise broken(weight, f"{missing} is missing: the config announces zero points")
        demand_dtype(zero, frozenset({"I32", "I8"}))
        if zero.dtype == "I32" and zero.shape != fitting:
            raise wrong_shape(zero, fitting)
        facts["zero"] = True

    def unpack(self, packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(number - zero point) times scale."""
        bits, (rows, columns) = packed.facts["bits"], packed.shape
        offset = 1 << (bits - 1)
        values_NK = unpack_words(parts[WEIGHT], bits).flatten(-2)[:, :columns].float().sub_(offset)
        scale_NG = parts[SCALE].float()
        groups = scale_NG.shape[1] if scale_NG.dim() == 2 else 1
        group_K = _groups_of_columns(packed, parts.get(_ORDER), columns, groups)
        if packed.facts.get("zero"):
            zero_NG = _zero_points(parts[_ZERO], bits, rows, groups)
            values_NK.sub_(zero_NG[:, group_K] if groups > 1 else zero_NG)
        return values_NK.mul_(scale_NG[:, group_K] if groups > 1 else scale_NG.reshape(-1, 1))


def _groups_of_columns(packed: Packed, order_K: torch.Tensor | None, columns: int, groups: int) -> torch.Tensor:
    if order_K is not None and groups > 1 and int(order_K.min()) >= 0:
        return order_K.long()
    return torch.arange(columns) // (packed.facts["group"] or columns)


def _zero_points(zero: torch.Tensor, bits: int, rows: int, groups: int) -> torch.Tensor:
    """Zero points as float32 [N, G]."""
    if zero.dtype == torch.int8:
        return zero.float().reshape(rows, groups)
    unpacked = unpack_words(zero.T, bits).flatten(-2)[:, :rows]
    return unpacked.T.float() - (1 << (bits - 1))


def scheme_of(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """How the weights of a module are quantized, by the group of `config_groups` that names it, or the only one.

    Raises:
        UnsupportedModel: several groups could be meant.
    """
    groups = [group for group in dict(settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    module = name.removesuffix(".weight")
    named = [group for group in groups if any(_meant(str(target), module) for target in group.get("targets") or [])]
    schemes = [group.get("weights") or {} for group in (named or groups)]
    different = [scheme for number, scheme in enumerate(schemes) if scheme not in schemes[:number]]
    if len(different) != 1:
        raise unreadable(f"{len(different)} groups of quantization_config could be meant by {name}")
    scheme: Mapping[str, Any] = different[0]
    return scheme


def _meant(target: str, module: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), module) is not None
        except re.error:
            return False
    return target == module or module.endswith("." + target)
