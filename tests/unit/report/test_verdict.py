from __future__ import annotations

import math

import pytest

from moekit.report.verdict import degenerate, flat


def test_a_curve_whose_rows_vary_is_sound():
    assert degenerate([2.8, 2.4, 1.9], devices=4, top_k=4) is None


def test_a_nearly_flat_curve_is_a_finding_not_a_failure():
    assert degenerate([2.8, 2.799, 2.801], devices=4, top_k=4) is None
    assert flat([2.8, 2.799], 2.8)
    assert not flat([2.8, 2.7], 2.8)


@pytest.mark.parametrize(
    ("rows", "devices", "top_k", "reason"),
    [
        ([2.5, 2.5, 2.5], 4, 4, "every point sends the same 2.5000 rows"),
        ([2.5, 2.5 + 1e-9], 4, 4, "the same"),
        ([2.0, 2.0], 2, 8, "touches every one of the 2 devices"),
        ([1.0, 1.0], 1, 4, "exactly one row"),
        ([1.0, 1.0], 4, 1, "exactly one row"),
        ([2.0], 4, 4, "1 point"),
        ([], 4, 4, "0 point"),
        ([0.9, 2.0], 4, 4, "impossible"),
        ([4.0, 2.1], 2, 4, "impossible"),
        ([3.0, 2.0], 8, 2, "impossible"),
        ([math.nan, 2.0], 4, 4, "not a number"),
    ],
)
def test_curves_that_say_nothing_are_named(rows, devices, top_k, reason):
    assert reason in degenerate(rows, devices=devices, top_k=top_k)


def test_a_placement_that_puts_everything_on_one_device_is_still_a_curve():
    assert degenerate([1.4, 1.0], devices=2, top_k=2) is None
