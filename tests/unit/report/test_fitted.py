"""The chart of loss over bytes, from what fit steps returned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.report.results import StepResult
from moekit.report.sections.fitted import fitted_finding, fitted_section

GIB = 1 << 30


def _tried(name: str, gib: float, measured: float | None) -> dict[str, Any]:
    return {"name": name, "bytes": int(gib * GIB), "measured": measured, "expected": 0.0, "recipes": ""}


def _step(name: str, tried: list[dict[str, Any]], price: str = "fisher") -> StepResult:
    best = tried[0]
    results: dict[str, Any] = {
        "model": "./moe",
        "price": price,
        "name": best["name"],
        "measured": best["measured"],
        "correlation": 0.9,
        "tried": tried,
        "front": [{"bytes": 2 * GIB, "expected": 0.5}, {"bytes": 4 * GIB, "expected": 0.1}],
        "bytes": {"before": 8 * GIB, "after": best["bytes"]},
    }
    return StepResult(id=name, use="fit", folder=Path(), config={}, results=results)


HALF = _step("half", [_tried("plan 1", 4, 0.02), _tried("width alone", 4, 0.03), _tried("random 1", 3.9, 0.4)])
QUARTER = _step("quarter", [_tried("plan 1 (width alone)", 2, 0.3), _tried("drop alone", 2, 0.8)])


def test_single_kinds_are_lines_over_the_budgets_of_a_run() -> None:
    section = fitted_section([HALF, QUARTER])
    assert section is not None
    (chart,) = section.charts
    series = {one.name: [(p.x, p.y) for p in one.points] for one in chart.series}
    assert series["front, expected"] == [(2.0, 0.5), (4.0, 0.1)]
    # A plan that is a single kind is both.
    assert series["planned"] == [(2.0, 0.3), (4.0, 0.02)]
    assert series["width alone"] == [(2.0, 0.3), (4.0, 0.03)]
    assert series["drop alone"] == [(2.0, 0.8)]
    assert {one.name for one in chart.series if not one.connect} == {"planned", "drawn by chance"}


def test_expectations_that_are_no_nats_are_not_drawn() -> None:
    section = fitted_section([_step("half", [_tried("plan 1", 4, 0.02)], price="change")])
    assert section is not None
    assert [one.name for one in section.charts[0].series] == ["planned"]


def test_nothing_to_draw_without_a_fit_that_was_measured() -> None:
    assert fitted_section([]) is None
    assert fitted_section([_step("half", [_tried("plan 1", 4, None)])]) is None


def test_the_finding_names_the_best_other_kind() -> None:
    half, quarter = fitted_finding([HALF, QUARTER])
    assert half.text == (
        "half: 50% of the bytes cost 0.0200 nats a token by the best plan; width alone would cost 0.0300."
    )
    assert "drop alone would cost 0.8000" in quarter.text
