"""Small integers in 32-bit words without gaps: number n of a row begins at bit n * bits, lowest bits first.

Where 32 is a multiple of the bits, no number crosses from one word into the next, and this is what all packed formats
do. Others (3, 5, 6 or 7 bits) run on into the next word, as in GPTQ's and AutoRound's files.

Legend: C numbers of a row, W = ceil(C * bits / 32) words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.errors import BadConfig

# Numbers after which words and numbers end together, whatever the bits.
_TOGETHER = 32


def pack_words(numbers_C: Tensor, bits: int) -> Tensor:
    """Numbers [..., C] as int32 words [..., W]. With 4 bits, 1, 2, ... 8 make 0x87654321.

    Args:
        numbers_C: whole numbers from 0 to 2^bits - 1.
        bits: of a number, 1 to 8.

    Raises:
        BadConfig: numbers that so many bits do not hold.
    """
    numbers_C = numbers_C.long()
    if numbers_C.numel() and (int(numbers_C.min()) < 0 or int(numbers_C.max()) >= 1 << bits):
        raise BadConfig(
            f"{bits} bits hold 0 to {(1 << bits) - 1}, not {int(numbers_C.min())} to {int(numbers_C.max())}"
        )
    columns = numbers_C.shape[-1]
    padded = _in_pieces(torch.nn.functional.pad(numbers_C, (0, -columns % _TOGETHER)), _TOGETHER)
    words = padded.new_zeros(*padded.shape[:-1], bits)
    for place in range(_TOGETHER):
        word, offset = divmod(place * bits, 32)
        words[..., word] |= padded[..., place] << offset
        if offset + bits > 32:
            words[..., word + 1] |= padded[..., place] >> (32 - offset)
    words &= 0xFFFFFFFF
    # As signed integers; a word's bits are what counts.
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.flatten(-2)[..., : word_count(columns, bits)].contiguous()


def unpack_words(words_W: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_words`: uint8 numbers [..., C].

    Args:
        words_W: int32 words.
        bits: of a number.
        columns: C.
    """
    filled = torch.nn.functional.pad(words_W.long() & 0xFFFFFFFF, (0, -words_W.shape[-1] % bits))
    words = _in_pieces(filled, bits)
    numbers = words.new_zeros(*words.shape[:-1], _TOGETHER)
    for place in range(_TOGETHER):
        word, offset = divmod(place * bits, 32)
        numbers[..., place] = words[..., word] >> offset
        if offset + bits > 32:
            numbers[..., place] |= words[..., word + 1] << (32 - offset)
    return (numbers & ((1 << bits) - 1)).flatten(-2)[..., :columns].to(torch.uint8)


def _in_pieces(values: Tensor, each: int) -> Tensor:
    return values.reshape(*values.shape[:-1], -1, each)


def word_count(columns: int, bits: int) -> int:
    """W."""
    return -(-columns * bits // 32)
