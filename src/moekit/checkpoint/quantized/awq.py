"""AWQ: whole numbers of four bits, packed along the outputs in an order of its own, scales and zero points by group.

`x.qweight` [K, N / 8] in int32, inputs first; `x.qzeros` [G, N / 8]; `x.scales` [G, N]; groups of inputs follow each
other.
Of the eight outputs of a word the lowest bits hold output 0, the next ones 2, 4, 6, 1, 3, 5, 7. A weight is
(number - zero point) x scale. (`version: gemm`; the layouts for other kernels differ.)

By hand: the word 0x7531_6420 holds in its output 0 the number 0, in output 1 the fifth from the right, 1, and so on: 0
to 7.

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
    demand_dtype,
    unreadable,
    wrong_shape,
)
from moekit.checkpoint.quantized.words import unpack_words

_ZERO = "zero point"
_BITS = 4
_PER_WORD = 8
# Output of a word -> where its four bits lie, counted from the lowest.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(Format):
    """Weights as AWQ packs them.

    Args:
        settings: with `bits` and `version`.
    """

    ending = ".qweight"
    plain_ending = ".weight"
    beside = (Beside(SCALE, (".scales",)), Beside(_ZERO, (".qzeros",)))

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        bits = settings.get("bits", settings.get("w_bit", _BITS))
        if version != "gemm" or bits != _BITS:
            raise unreadable(f"AWQ's layout {version!r} in {bits} bits is made for another kernel")

    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """Groups are told by the scales."""
        weight, scale, zero = parts[WEIGHT], parts[SCALE], parts[_ZERO]
        for info in (weight, zero):
            demand_dtype(info, frozenset({"I32"}))
        demand_dtype(scale, WIDE)
        if len(weight.shape) != 2:
            raise broken(weight, f"{weight.name} of shape {list(weight.shape)} is no matrix")
        inputs, words = weight.shape
        outputs, groups = words * _PER_WORD, scale.shape[0] if scale.shape else 0
        if scale.shape != (groups, outputs) or groups < 1 or inputs % groups:
            raise wrong_shape(scale, (max(1, groups), outputs))
        if zero.shape != (groups, words):
            raise wrong_shape(zero, (groups, words))
        return Packed(name, parts, (outputs, inputs))

    def unpack(self, packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(number - zero point) times scale, outputs first."""
        number_KN, zero_GN = (in_order(parts[role]).float() for role in (WEIGHT, _ZERO))
        groups = zero_GN.shape[0]
        by_group = number_KN.view(groups, -1, number_KN.shape[1])
        by_group.sub_(zero_GN[:, None]).mul_(parts[SCALE].float()[:, None])
        return number_KN.T.contiguous()


def in_order(words: torch.Tensor) -> torch.Tensor:
    """Numbers of words [X, N / 8] in the order of outputs, uint8 [X, N]."""
    return unpack_words(words, _BITS)[..., list(_PLACES)].flatten(-2)
