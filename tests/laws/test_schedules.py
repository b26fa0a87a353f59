"""What holds for every registered schedule, and values worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from moekit import catalogue
from moekit.errors import BadConfig
from moekit.training.schedules.base import Ramp, read_schedule

ALL = list(catalogue.methods("schedule"))
RAMPS = [record for record in ALL if issubclass(record.cls, Ramp)]


@pytest.mark.parametrize("record", ALL, ids=lambda r: r.name)
def test_values_are_finite_and_depend_on_progress_alone(record: catalogue.MethodRecord) -> None:
    for example in record.cls.examples():
        one, two = (catalogue.make("schedule", record.name, example.model_dump(exclude_unset=True)) for _ in range(2))
        places = [i / 97 for i in range(98)]
        straight = [one.value(p) for p in places]
        assert all(math.isfinite(value) for value in straight)
        # A run that resumes asks for the second half alone.
        assert [two.value(p) for p in places[49:]] == straight[49:]


@pytest.mark.parametrize("record", RAMPS, ids=lambda r: r.name)
@pytest.mark.parametrize("ends", [(2.0, 0.5), (1.0, 8.0)])
def test_ramps_meet_their_ends_and_never_turn(record: catalogue.MethodRecord, ends: tuple[float, float]) -> None:
    ramp = catalogue.make("schedule", record.name, {"start": ends[0], "end": ends[1], "after": 0.2, "until": 0.7})
    assert ramp.value(0.0) == ramp.value(0.2) == ends[0]
    assert ramp.value(0.7) == ramp.value(1.0) == ends[1]
    values = [ramp.value(i / 200) for i in range(201)]
    rising = ends[1] > ends[0]
    assert all((b >= a) if rising else (b <= a) for a, b in pairwise(values))
    assert min(ends) <= min(values) <= max(values) <= max(ends)


BY_HAND = [
    # Temperatures of a dense-to-sparse gate, 2 -> 0.3.
    ({"use": "linear", "start": 2.0, "end": 0.3}, [(0.25, 1.575), (0.5, 1.15), (0.75, 0.725)]),
    ({"use": "exp", "start": 2.0, "end": 0.3}, [(0.25, 1.2447), (0.5, 0.7746), (0.75, 0.4821)]),
    ({"use": "cosine", "start": 1.0, "end": 0.0}, [(0.5, 0.5), (1 / 3, 0.75)]),
    ({"use": "cubic", "start": 0.0, "end": 0.8}, [(0.5, 0.7)]),
    ({"use": "steps", "values": [1, 2, 4]}, [(0.0, 1), (0.33, 1), (0.34, 2), (0.67, 4), (1.0, 4)]),
    ({"use": "steps", "values": [1, 5], "at": [0.9]}, [(0.89, 1), (0.9, 5)]),
    ({"use": "constant", "at": 7.0}, [(0.3, 7.0)]),
    (
        {
            "use": "phases",
            "phases": [
                {"until": 0.2, "schedule": {"use": "constant", "at": 8.0}},
                {"until": 1.0, "schedule": {"use": "linear", "start": 8.0, "end": 0.0}},
            ],
        },
        [(0.1, 8.0), (0.2, 8.0), (0.6, 4.0), (1.0, 0.0)],
    ),
]


@pytest.mark.parametrize(("stated", "expected"), BY_HAND, ids=lambda v: v["use"] if isinstance(v, dict) else "")
def test_values_worked_out_by_hand(stated: dict[str, Any], expected: list[tuple[float, float]]) -> None:
    schedule = read_schedule(stated)
    assert [schedule.value(p) for p, _ in expected] == pytest.approx([v for _, v in expected], rel=1e-4)


def test_every_schedule_is_worked_out_by_hand() -> None:
    assert {stated["use"] for stated, _ in BY_HAND} == {record.name for record in ALL if record.origin == "moekit"}


def test_choices_a_token_grow_when_they_should() -> None:
    """SMoE-Dropout (arXiv:2303.01610): 2 to 8 experts in 1,000 steps."""
    schedule = read_schedule({"use": "linear", "start": 2, "end": 8})
    counts = [round(schedule.value(step / 1000)) for step in range(1000)]
    assert [counts.index(k) for k in range(3, 9)] == [84, 250, 417, 584, 751, 917]


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"use": "linear"},
        {"use": "linaer", "start": 0, "end": 1},
        {"use": "linear", "start": 0, "end": 1, "after": 0.5, "until": 0.5},
        {"use": "exp", "start": 0, "end": 1},
        {"use": "steps", "values": [1, 2], "at": [0.1, 0.2]},
        {"use": "steps", "values": [1, 2, 3], "at": [0.5, 0.2]},
        {"use": "phases", "phases": [{"until": 0.5, "schedule": {"use": "constant", "at": 1}}]},
        {"use": "phases", "phases": [{"until": 1, "schedule": {"use": "none"}}]},
    ],
)
def test_impossible_schedules_are_refused(stated: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        read_schedule(stated)
