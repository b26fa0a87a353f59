"""How wide experts become: numbers, shares, bytes, and the multiples they are rounded to."""

from __future__ import annotations

from fractions import Fraction

import pytest

from moekit.compress.budget.width import multiple_for, parse_bytes, parse_width, width_for, width_for_bytes
from moekit.errors import BadConfig


@pytest.mark.parametrize(
    ("before", "multiple"),
    [(6400, 64), (1408, 64), (768, 64), (512, 64), (511, 32), (256, 32), (24, 2), (8, 1), (3, 1)],
)
def test_a_multiple_by_default_fits_eight_times(before: int, multiple: int) -> None:
    assert multiple_for(before) == multiple
    assert multiple_for(before, 16) == 16


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (384, 384),
        ("384", 384),
        ("1/2", Fraction(1, 2)),
        (" 2 / 3 ", Fraction(2, 3)),
        (0.5, Fraction(1, 2)),
        (".25", Fraction(1, 4)),
        (1.0, Fraction(1)),
        ("1.0", Fraction(1)),
        ("1", 1),
    ],
)
def test_numbers_and_shares_are_told_apart(asked: int | float | str, wanted: int | Fraction) -> None:
    found = parse_width(asked)
    assert (type(found), found) == (type(wanted), wanted)


@pytest.mark.parametrize("asked", ["half", "", "-3", 0, 0.0, "3/2", "1/0", 1.5, "0/4", "12GiB", "nan"])
def test_anything_else_is_refused(asked: int | float | str) -> None:
    with pytest.raises(BadConfig):
        parse_width(asked)


@pytest.mark.parametrize(
    ("asked", "before", "multiple", "width"),
    [
        ("1/2", 768, 64, 384),
        ("3/20", 6400, 64, 960),  # as wide as Phi-mini-MoE's
        ("0.07", 6400, 64, 448),  # as Phi-tiny-MoE's
        ("1/2", 704, 64, 384),  # 352 is half-way between 320 and 384
        ("1/100", 768, 64, 64),
        ("0.99", 100, 64, 100),
        (1.0, 100, 64, 100),
        (100, 100, 64, 100),
        (128, 768, 64, 128),
        ("1/3", 24, 1, 8),
    ],
)
def test_shares_go_to_the_nearest_multiple(asked: int | float | str, before: int, multiple: int, width: int) -> None:
    assert width_for(asked, before, multiple) == width


def test_impossible_numbers_name_the_nearest() -> None:
    with pytest.raises(BadConfig, match="100 neurons are no multiple of 64") as told:
        width_for(100, 768, 64)
    assert told.value.hint is not None
    assert "ask for 128" in told.value.hint
    with pytest.raises(BadConfig, match="768 neurons cannot become 800"):
        width_for(800, 768, 64)


def test_bytes_give_the_widest_that_fits() -> None:
    asked: list[int] = []

    def nbytes(width: int) -> int:
        asked.append(width)
        return 1000 + 30 * width

    for limit, width in ((10**9, 770), (1000 + 30 * 770, 770), (1000 + 30 * 770 - 1, 768), (1000 + 30 * 400, 384)):
        assert width_for_bytes(limit, 770, 64, nbytes) == width
    assert width_for_bytes(1000 + 30 * 64, 770, 64, nbytes) == 64
    assert all(width % 64 == 0 or width == 770 for width in asked)
    with pytest.raises(BadConfig, match="do not hold experts of 64 neurons") as told:
        width_for_bytes(1000 + 30 * 64 - 1, 770, 64, nbytes)
    assert told.value.hint is not None
    assert "2,920 bytes" in told.value.hint
    assert (parse_bytes("12GiB"), parse_bytes(" 1.5 mb ")) == (12 << 30, 1_500_000)
    for wrong in ("12", "many", "12 apples"):
        with pytest.raises(BadConfig, match="is no size"):
            parse_bytes(wrong)
