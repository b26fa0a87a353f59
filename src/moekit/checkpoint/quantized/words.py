"""Small integers out of 32-bit words, lowest bits first.

Legend: W words, B bits of a number, P = 32 / B numbers a word.
"""

from __future__ import annotations

import torch

# Bit widths that fill a word without a number crossing into the next.
WHOLE = (2, 4, 8)


def unpack_words(words_W: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers of int32 words [..., W], as uint8 [..., W, P].

    With 4 bits 0x87654321 holds 1, 2, 3, 4, 5, 6, 7, 8.
    """
    count = 32 // bits
    numbers = torch.empty(*words_W.shape, count, dtype=torch.uint8)
    for number in range(count):
        # A shift of a negative word brings ones from the left; the mask takes them away.
        numbers[..., number] = (words_W >> (bits * number)) & ((1 << bits) - 1)
    return numbers
