"""Packing against Python's whole numbers, one bit string a row."""

from __future__ import annotations

import pytest
import torch

from moekit.checkpoint.quantized.running import pack_words, unpack_words, word_count
from moekit.errors import BadConfig


def by_hand(row: list[int], bits: int) -> list[int]:
    """All numbers of a row as one whole number, cut into words of 32 bits, as signed integers."""
    whole = sum(number << (bits * place) for place, number in enumerate(row))
    words = [(whole >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def test_a_word_by_hand() -> None:
    assert pack_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).tolist() == [[0x87654321 - (1 << 32)]]
    # 3 bits: the eleventh number has its lowest two bits in the first word and the third in the second.
    assert pack_words(torch.tensor([0] * 10 + [5]), 3).tolist() == [(1 << 30), 1]
    assert pack_words(torch.tensor([1, 0, 1, 1]), 1).tolist() == [0b1101]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 96, 100])
def test_packed_and_back(bits: int, columns: int) -> None:
    numbers = torch.randint(0, 1 << bits, (2, 3, columns), generator=torch.Generator().manual_seed(bits))
    numbers[0, 0] = (1 << bits) - 1
    words = pack_words(numbers, bits)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, word_count(columns, bits))
    assert words.flatten(0, 1).tolist() == [by_hand(row, bits) for row in numbers.flatten(0, 1).tolist()]
    assert torch.equal(unpack_words(words, bits, columns), numbers.to(torch.uint8))


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadConfig, match="2 bits hold 0 to 3, not 0 to 4"):
        pack_words(torch.tensor([0, 4]), 2)
    with pytest.raises(BadConfig, match="not -1 to 1"):
        pack_words(torch.tensor([-1, 1]), 2)
