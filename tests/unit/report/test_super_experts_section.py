"""The sections on super experts say what the study says."""

from __future__ import annotations

import pytest

from moekit.diagnose.super_experts.finding import find_super_experts
from moekit.diagnose.super_experts.massive_activations import LayerStream
from moekit.diagnose.super_experts.report import SHARED
from moekit.evaluation.skipping import UNCHANGED
from moekit.evaluation.super_expert_study import SuperExpertStudy
from moekit.evaluation.super_experts import RANDOM, WITHOUT, Control, Outcome, SuperExpertCheck
from moekit.report.data import LinesSection, ReportData, RunInfo, TableSection
from moekit.report.page import to_html
from moekit.report.parts import Interval
from moekit.report.sections.super_experts import made_by, super_expert_finding, super_expert_sections
from tests.unit.diagnose.super_experts.test_super_experts import CODE, example
from tests.unit.evaluation.test_super_experts import comparison
from tests.unit.report.test_page import HOSTILE, Page


def stream(layer: int, origin: str, expert: int | None = None, value: float = 700.0) -> LayerStream:
    place = {"value": value, "channel": 5, "position": 0, "median": 0.25}
    gain = {"gain": value / 2, "gain_channel": 5, "gain_position": 0}
    told = {"layer": layer, "kind": "moe", "massive": bool(origin), "origin": origin, "expert": expert}
    return LayerStream(**place, **gain, **told)  # type: ignore[arg-type]


def study(outcome: Outcome | None = None, name: str = "text") -> SuperExpertStudy:
    check = None
    if outcome is not None:
        check = SuperExpertCheck(
            source="held",
            window=64,
            pairs=((1, 7), (2, SHARED)),
            without=comparison(0.7),
            controls=tuple(Control(seed=n, pairs=((1, n), (2, n)), text=comparison(0.01)) for n in range(2)),
            against=comparison(0.69),
            largest={
                UNCHANGED: {0: 1.0, 1: 700.0},
                WITHOUT: {0: 1.0, 1: 2.0},
                RANDOM: {0: 1.0, 1: 699.0},
            },
            outcome=outcome,
        )
    streams = (stream(0, "", value=1.0), stream(1, "routed", 7), stream(2, "passed on"))
    return SuperExpertStudy.of(find_super_experts(example(), **CODE), streams, name, check)


def test_the_chart_shows_each_layer_with_and_without() -> None:
    first = super_expert_sections(study("breaks"))[0]
    assert isinstance(first, LinesSection)
    [chart] = first.charts
    assert [[(p.x, p.y) for p in s.points] for s in chart.series] == [
        [(0, 1.0), (1, 700.0), (2, 700.0)],
        [(0, 1.0), (1, 700.0)],
        [(0, 1.0), (1, 2.0)],
        [(0, 1.0), (1, 699.0)],
    ]
    assert first.lead.startswith("In 2 of 3 layers some value is massive")
    assert "Made in layer 1 (expert 7, channel 5: 350.0)." in first.lead
    assert len(super_expert_sections(study())[0].charts[0].series) == 1  # type: ignore[union-attr]


def test_tables_name_experts_and_layers() -> None:
    second = super_expert_sections(study())[1]
    assert isinstance(second, TableSection)
    experts, layers = second.tables
    assert [row[:4] for row in experts.rows[:3]] == [
        ("7", 1, "yes", 700.0),
        ("3", 2, "yes", 400.0),
        ("4", 7, "", 900.0),
    ]
    assert [row[-1] for row in layers.rows] == [None, "expert 7", "passed on"]
    assert "percentile 99.5 (231.70)" in second.note
    assert "At most 2 experts" in second.note
    assert second.lead == "Super experts: 7 of layer 1, 3 of layer 2."


def test_the_check_is_shown_against_others() -> None:
    *_, last = super_expert_sections(study("breaks"), "the model")
    assert isinstance(last, TableSection)
    assert last.title == "Does the model break without them?: the model"
    rows = last.tables[0].rows
    assert [row[0] for row in rows] == [
        UNCHANGED,
        WITHOUT,
        f"{RANDOM}, draw 0",
        f"{RANDOM}, draw 1",
        f"{WITHOUT}, against the mean of others",
    ]
    assert rows[1][1] == "1:7 2:shared"
    assert isinstance(rows[1][3], Interval)
    assert rows[1][3].mean == pytest.approx(2.0137 - 1, abs=0.05)
    assert "the model breaks: perplexity" in last.lead
    assert len(super_expert_sections(study())) == 2


def test_the_finding_says_whether_the_model_breaks() -> None:
    broken, whole, unchecked = (super_expert_finding(study(o)) for o in ("breaks", "holds", None))
    assert broken.status == "bad"
    assert "without its 2 super experts the model breaks" in broken.text
    assert whole.status == unchecked.status == "neutral"
    assert "does not break, no loss shows: perplexity" in whole.text
    assert unchecked.text == "Super experts: 7 of layer 1, 3 of layer 2."
    assert "Checked on" in broken.detail
    assert "Checked on" not in unchecked.detail


def test_no_massive_activation_is_said_so() -> None:
    bare = study().model_copy(update={"streams": (stream(0, "", value=1.0),)})
    assert super_expert_sections(bare)[0].lead.startswith("No layer holds a massive activation")


@pytest.mark.parametrize(
    ("origin", "words"),
    [("shared", "shared expert"), ("experts", "several experts"), ("dense", "dense network"), ("attention",) * 2],
)
def test_what_made_it_in_words(origin: str, words: str) -> None:
    assert made_by(stream(1, origin)) == words


def test_names_cannot_break_the_page() -> None:
    for name in HOSTILE:
        told = study("suffers", name)
        data = ReportData(
            title="t",
            headline=super_expert_finding(told),
            sections=tuple(super_expert_sections(told, name)),
            run=RunInfo(date="2026-01-01T00:00:00Z"),
        )
        page = Page(to_html(data))
        assert any(name in text for _, text in page.texts)
        assert not page.every("img")
        assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
