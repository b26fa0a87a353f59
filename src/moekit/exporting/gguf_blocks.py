"""Whole numbers and scales in GGUF's blocks of 32: what symmetric grids stand for, to the bit.

A block is a scale in float16 and 32 numbers. Q4_0 holds -8 to 7 as q + 8, the first sixteen in the low halves of
sixteen bytes and the others in the high ones; Q5_0 holds -16 to 15 alike, with the fifth bits of q + 16 in a word
before them; Q8_0 holds -128 to 127 in a byte each. Narrower numbers lie in wider blocks as they are, so that experts of
different widths fit into the one tensor that GGUF has for all experts of a layer.

Legend: R rows (outputs) and C columns (inputs) of a matrix, G scales of a row, B = R C / 32 blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.exporting.recovery import Recovered

BLOCK = 32
# Name of a block's type -> the most bits that it holds, and its bytes.
BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}
Bytes = NDArray[np.uint8]


def narrowest(bits: int) -> str:
    """The smallest type that holds numbers of so many bits."""
    return next(name for name, most in BITS.items() if bits <= most)


def fits(columns: int, group: int) -> bool:
    """Whether rows and their groups come in whole blocks."""
    return columns % BLOCK == 0 and (group or columns) % BLOCK == 0


def packed(found: Recovered, kind: str) -> Bytes:
    """The bytes of a matrix, a row of bytes for each row [R, C / 32 * bytes of a block].

    Args:
        found: numbers and scales.
        kind: of the blocks: Q4_0, Q5_0 or Q8_0.
    """
    rows, columns = found.numbers_RC.shape
    numbers_B32 = found.numbers_RC.numpy().reshape(-1, BLOCK)
    scale_RG = found.scale_RG.numpy()
    blocks_of_group = columns // BLOCK // scale_RG.shape[1]
    scale_B2 = np.repeat(scale_RG, blocks_of_group, axis=1).reshape(-1, 1).astype("<f2").view(np.uint8)
    parts: list[Bytes] = [scale_B2]
    if kind == "Q8_0":
        parts.append(numbers_B32.astype(np.int8).view(np.uint8))
    else:
        above_B32 = (numbers_B32 + (1 << (BITS[kind] - 1))).astype(np.uint8)
        if kind == "Q5_0":
            fifth_B32: Bytes = (above_B32 >> 4).astype(np.uint8)
            parts.append(np.packbits(fifth_B32, axis=-1, bitorder="little"))
        low_B16, high_B16 = above_B32[:, :16] & 15, above_B32[:, 16:] & 15
        parts.append((low_B16 | (high_B16 << 4)).astype(np.uint8))
    return np.concatenate(parts, axis=1).reshape(rows, -1)
