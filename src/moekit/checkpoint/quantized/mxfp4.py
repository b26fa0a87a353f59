"""MXFP4: sixteen values of four bits, 32 neighbours sharing a power of two (OCP Microscaling Formats 1.0).

GPT-OSS (`quant_method: mxfp4`): `gate_up_proj_blocks` [E, N, K / 32, 16] in bytes, two numbers each, the lower four
bits first; `gate_up_proj_scales` [E, N, K / 32] in bytes b that stand for 2 ** (b - 127). Rows are outputs, where the
model's own parameter [E, K, N] has inputs first, so what is read is turned around. Gates and ups take turns along N, in
both.

By hand: a block that begins with the bytes 0x21 0x9f, scale byte 128, begins with
1 -> 0.5, 2 -> 1, 15 -> -6, 9 -> -0.5, each times 2 ** 1: 1, 2, -12, -1.

Legend: E experts, N outputs, K inputs, G groups of 32, B bytes of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.quantized.base import SCALE, WEIGHT, Beside, Format, Packed, demand_dtype, wrong_shape
from moekit.checkpoint.quantized.fp8 import exponents_or_floats

# e2m1: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
GROUP_BYTES = 16
# Both numbers of a byte, [256, 2].
_PAIRS = torch.stack([VALUES[torch.arange(256) % 16], VALUES[torch.arange(256) // 16]], -1)


class Mxfp4(Format):
    """Experts in four-bit floats."""

    ending = "_blocks"
    plain_ending = ""
    beside = (Beside(SCALE, ("_scales",)),)

    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """Stacked experts, inputs before outputs."""
        blocks, scales = parts[WEIGHT], parts[SCALE]
        demand_dtype(blocks, frozenset({"U8"}))
        demand_dtype(scales, frozenset({"U8", "F8_E8M0"}))
        if len(blocks.shape) != 4 or blocks.shape[-1] != GROUP_BYTES:
            raise wrong_shape(blocks, (*blocks.shape[:3], GROUP_BYTES))
        if scales.shape != blocks.shape[:-1]:
            raise wrong_shape(scales, blocks.shape[:-1])
        experts, outputs, groups, _ = blocks.shape
        return Packed(name, parts, (experts, groups * 2 * GROUP_BYTES, outputs), stacked=True)

    def unpack(self, packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Look the pairs up, scale them, turn them around."""
        blocks_ENGB = parts[WEIGHT]
        pairs = _PAIRS.index_select(0, blocks_ENGB.flatten().int())
        values = pairs.view(*blocks_ENGB.shape[:-1], 2 * GROUP_BYTES)
        values.mul_(exponents_or_floats(parts[SCALE])[..., None])
        return values.flatten(-2).transpose(-1, -2).contiguous()
