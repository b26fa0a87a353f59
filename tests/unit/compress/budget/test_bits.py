"""Bits asked for, and the bytes of a packed form, worked by hand."""

from __future__ import annotations

import pytest

from moekit.compress.budget.bits import BitBudget, check_group, packed_bits, packed_bytes, parse_bits
from moekit.errors import BadConfig


@pytest.mark.parametrize(
    ("bits", "group", "each"),
    [
        (4, 64, 4.3125),  # a scale of 16 bits and a zero point of 4 for 64 weights
        (4, 128, 4.15625),
        (2, 128, 2.140625),
        (1, 128, 1.125),  # no zero point
        (8, 32, 8.75),
    ],
)
def test_bits_a_weight_with_scales_and_zeros(bits: int, group: int, each: float) -> None:
    assert packed_bits(1024, bits, group) / 1024 == each
    assert packed_bytes(1024, bits, group) == each * 128


def test_a_group_that_is_not_full_has_a_scale_too() -> None:
    assert packed_bits(100, 3, 64) == 300 + 2 * 19
    assert packed_bits(1024, 4, 128, symmetric=True) / 1024 == 4.125  # no zero points
    assert packed_bytes(100, 3, 64) == 43  # 338 bits


def test_bits_by_number_and_by_part() -> None:
    assert parse_bits(3) == parse_bits("3") == {"gate": 3, "up": 3, "down": 3}
    assert parse_bits("gate=2, down=8") == {"gate": 2, "down": 8}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (0, "'0' bits"),
        (9, "'9' bits"),
        (-3, "'-3' bits"),
        ("2.5", "'2.5' bits"),
        ("gate=2,gate=3", "twice"),
        ("router=2", "is no part"),
        ("gate=", "'' bits"),
        ("three", "'three' bits"),
    ],
)
def test_impossible_bits(asked: int | str, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        parse_bits(asked)


def test_a_budget_holds_possible_bits_only() -> None:
    with pytest.raises(ValueError, match="bits are 1 to 8"):
        BitBudget(bits={"up": 16})


def test_groups_that_do_not_divide_name_those_that_do() -> None:
    check_group(0, {"up": 2048, "down": 100})
    check_group(4, {"up": 2048, "down": 100})
    with pytest.raises(BadConfig, match=r"groups of 128 do not divide the 192 inputs of the down") as told:
        check_group(128, {"up": 2048, "down": 192}, 3)
    assert "group=64" in str(told.value.hint)
    assert told.value.layer == 3
