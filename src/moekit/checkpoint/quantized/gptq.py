"""GPTQ: whole numbers of 2, 4 or 8 bits, packed along the inputs, a scale and a zero point for each group of inputs.

`x.qweight` [K / P, N] in int32, P = 32 / bits inputs a word, lowest bits first: the weight lies turned around, inputs
first. `x.scales` [G, N]; `x.qzeros` [G, N / P], packed along the outputs; `x.g_idx` [K] names each input's group
(without it, groups follow each other). A weight is (number - zero point) x scale. The first version of the format
(`checkpoint_format: gptq`) stores zero points less one, `gptq_v2` as they are.

By hand, 4 bits, one output, eight inputs, one group: the word 0x0000_0f98 holds 8, 9, 15, 0, ...; qzeros 0x7 is the
zero point 8 in the first version, so with scale 0.5 the weights are 0, 0.5, 3.5, -4, ...

Legend: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

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
_PLAIN = frozenset({"gptq", "gptq_v2"})


class Gptq(Format):
    """Weights as GPTQ packs them.

    Args:
        settings: with `bits`, and `checkpoint_format` where it is not the first.
    """

    ending = ".qweight"
    plain_ending = ".weight"
    beside = (
        Beside(SCALE, (".scales",)),
        Beside(_ZERO, (".qzeros",)),
        Beside(_ORDER, (".g_idx",), needed=False),
    )

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
        if self.version not in _PLAIN:
            raise unreadable(f"GPTQ's layout {self.version!r} is made for one kernel")

    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """The number of bits follows from the shapes where `g_idx` says how many inputs there are."""
        weight, scale, zero, order = parts[WEIGHT], parts[SCALE], parts[_ZERO], parts.get(_ORDER)
        for info in (weight, zero, *([order] if order else [])):
            demand_dtype(info, frozenset({"I32"}))
        demand_dtype(scale, WIDE)
        if len(weight.shape) != 2 or (order is not None and len(order.shape) != 1):
            raise broken(weight, f"{weight.name} of shape {list(weight.shape)} is no matrix")
        words, outputs = weight.shape
        told = self.settings.get("bits")
        bits = words * 32 // order.shape[0] if order is not None and order.shape[0] else told
        if bits not in WHOLE:
            raise unreadable(f"{weight.name} is packed in {bits} bits")
        inputs = words * 32 // bits
        if order is not None and order.shape[0] != inputs:
            raise wrong_shape(order, (inputs,))
        groups = scale.shape[0] if scale.shape else 0
        if scale.shape != (groups, outputs) or not 1 <= groups <= inputs:
            raise wrong_shape(scale, (max(1, groups), outputs))
        if zero.shape != (groups, ceil_div(outputs * bits, 32)):
            raise wrong_shape(zero, (groups, ceil_div(outputs * bits, 32)))
        return Packed(name, parts, (outputs, inputs), facts={"bits": bits, "groups": groups})

    def unpack(self, packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(number - zero point) times scale, outputs first."""
        bits, (outputs, inputs) = packed.facts["bits"], packed.shape
        scale_GN = parts[SCALE].float()
        zero_GN = unpack_words(parts[_ZERO], bits).flatten(-2)[:, :outputs]
        if self.version == "gptq":  # less one, which went around below zero
            zero_GN = (zero_GN.int() + 1) & ((1 << bits) - 1)
        group_K = self._groups(packed, parts.get(_ORDER), inputs)
        number_KN = unpack_words(parts[WEIGHT], bits).transpose(-1, -2).flatten(0, 1).float()
        number_KN.sub_(zero_GN.float()[group_K]).mul_(scale_GN[group_K])
        return number_KN.T.contiguous()

    @staticmethod
    def _groups(packed: Packed, order_K: torch.Tensor | None, inputs: int) -> torch.Tensor:
        groups = packed.facts["groups"]
        if order_K is None:
            return torch.arange(inputs) // ceil_div(inputs, groups)
        group_K = order_K.long()
        if int(group_K.min()) < 0 or int(group_K.max()) >= groups:
            info = packed.parts[_ORDER]
            raise broken(info, f"{info.name} names groups {int(group_K.min())} to {int(group_K.max())} of {groups}")
        return group_K
