"""The page of a pruning bench says what the numbers say."""

from __future__ import annotations

import re
import statistics
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from moekit.bench.pruning import Entry, PruneBenchResult, PruneBenchSetting, PruneRun
from moekit.bench.pruning.ranking import all_rankings
from moekit.bench.pruning.result import CalibrationDraw, Cut, Skipped
from moekit.evaluation.documents import PerplexityResult
from moekit.report.charts.lines import line_chart
from moekit.report.page import build, to_html
from moekit.report.parts import Axis, Interval, LineChart, Point, Series
from moekit.report.sections.pruning import (
    inside_section,
    layers_section,
    pareto_sections,
    ranking_section,
    report,
    tasks_section,
)
from moekit.report.sections.pruning_findings import findings, headline
from tests.unit.report.test_page import HOSTILE, Page

DOMAINS = ("prose",) * 6 + ("sums",) * 6
TOKENS = tuple(range(40, 52))
# What each method adds to the loss at half of the experts; a quarter of that at three quarters.
COSTS = {"random": 1.0, "frequency": 0.5, "easy-ep": 0.1, "reap": 0.2, "ean": 0.25, "man": 1.6}
COSTS |= {"naee": 0.15, "stun": 0.6, "dern": 0.4}


def text(loss: float, noise: int) -> PerplexityResult:
    shift = np.random.default_rng(noise).normal(0, 0.02, len(TOKENS)) if noise else np.zeros(len(TOKENS))
    nll = tuple(float(n * (loss + s)) for n, s in zip(TOKENS, shift, strict=True))
    return PerplexityResult(domains=DOMAINS, tokens=TOKENS, nll=nll)


def made(costs: dict[str, float] | None = None, names: dict[str, str] | None = None) -> PruneBenchResult:
    """Nine methods at two sizes, three seeds of random, decided from all text and from `sums` alone."""
    costs, names, runs = costs or COSTS, names or {}, []
    for keep, factor in ((0.75, 0.25), (0.5, 1.0)):
        for calibration, task in (("all", 0.0), ("sums", 0.05)):
            for number, (method, cost) in enumerate(costs.items()):
                for seed in range(3 if method == "random" else 1):
                    loss = 2.0 + factor * (cost + 0.2 * seed) + (0.0 if method == "random" else task)
                    runs.append(
                        PruneRun(
                            name=names.get(method, method),
                            method=method,
                            settings={},
                            keep=keep,
                            seed=seed,
                            calibration=calibration,
                            perplexity=text(loss, 1 + number),
                            experts={0: int(8 * keep), 1: int(8 * keep)},
                            reconstruction={0: cost * factor, 1: cost * factor + seed},
                            lost_tokens={0: 0.5, 1: 0.25},
                            lost_choices={0: 0.25, 1: 0.125},
                            bytes=int(1000 * keep),
                            decide_seconds=1.0,
                            rewrite_seconds=0.5,
                        )
                    )
    entries = tuple(Entry(method=method, label=names.get(method, method)) for method in costs)
    result = PruneBenchResult(
        model="m",
        fingerprint="f" * 64,
        experts={0: 8, 1: 8},
        top_k=2,
        bytes=1000,
        setting=PruneBenchSetting(entries=entries, keep=(0.75, 0.5), seeds=3, domains=("sums",)),
        calibrations=(
            CalibrationDraw(name="all", domains={"prose": 900, "sums": 800}, documents=20, never_routed={0: 0, 1: 2}),
            CalibrationDraw(name="sums", domains={"sums": 800}, documents=10, never_routed={0: 0, 1: 0}),
        ),
        calibration_seconds=3.0,
        unchanged=text(2.0, 0),
        runs=tuple(runs),
        skipped=(Skipped(name="uncurl", calibration="all", reason="layer 3: the router has no matrix"),),
    )
    return result.model_copy(update={"rankings": all_rankings(result)})


@pytest.fixture(scope="module")
def result() -> PruneBenchResult:
    return made()


def test_every_method_has_a_line_and_random_a_band_in_every_chart(result: PruneBenchResult) -> None:
    sections = pareto_sections(result)
    charts = [chart for section in sections for chart in section.charts]
    assert [len(chart.series) for chart in charts] == [6, 4]
    assert [s.name for s in charts[0].series] == ["random", "easy-ep", "naee", "reap", "ean", "dern"]
    assert {s.name for chart in charts for s in chart.series} == set(COSTS)
    for chart in charts:
        random = chart.series[0]
        assert [s.band for s in chart.series] == [s.name == "random" for s in chart.series]
        assert [p.x for p in random.points] == [0.5, 0.75, 1.0]
        runs = [run.perplexity.overall.nll for run in result.select("random", 0.5)]
        assert random.points[0].y == pytest.approx(statistics.fmean(runs))
        assert (random.points[0].y_low, random.points[0].y_high) == (min(runs), max(runs))
        assert all(s.points[-1].y == result.unchanged.overall.nll for s in chart.series)
        for series in chart.series[1:]:
            assert series.points[0].y_low is None, "one run spans nothing"
    assert "unchanged model" in sections[0].lead


def test_the_table_ranks_and_says_what_is_avoided(result: PruneBenchResult) -> None:
    three_quarters, half = ranking_section(result).tables
    assert "75" in three_quarters.caption
    assert "50 % of the bytes" in half.caption.replace("\N{NO-BREAK SPACE}", " ")
    names = [str(row[0]) for row in half.rows]
    assert names == ["easy-ep", "naee", "reap", "ean", "dern", "frequency", "stun", "random, 3 seeds", "man"]
    columns = [column.name for column in half.columns]
    best = dict(zip(columns, half.rows[0], strict=True))
    own = result.select("easy-ep", 0.5)[0].perplexity.overall.nll
    rise = best["rise"]
    assert isinstance(rise, Interval)
    assert rise.mean == pytest.approx(own - result.unchanged.overall.nll)
    share = best["avoided"]
    assert isinstance(share, Interval)
    random = statistics.fmean(run.perplexity.overall.nll for run in result.select("random", 0.5))
    assert share.mean == pytest.approx(1 - (own - 2.0) / (random - 2.0))
    chance = dict(zip(columns, half.rows[-2], strict=True))
    assert chance["avoided"] is None
    inside = inside_section(result).tables[1]
    rows = {row[0]: row[1:] for row in inside.rows}
    assert rows["easy-ep"] == (0.1, 0.375, 1, None, 1.5)
    assert rows["random"][2:] == (3, pytest.approx(0.2), 1.5)
    assert [bool(c.note) for c in inside.columns] == [False] * 6, "what columns mean is said once"


def test_a_task_is_told_from_the_rest(result: PruneBenchResult) -> None:
    tables = tasks_section(result).tables
    assert [t.caption.split(",")[0] for t in tables] == ["sums", "sums"]
    rows = {row[0]: row for row in tables[1].rows}
    own, whole, gain, elsewhere, everywhere = rows["reap"][1:]

    def loss(calibration: str, domain: str) -> float:
        found = result.select("reap", 0.5, calibration)[0].perplexity
        return next(d.nll for d in found.per_domain() if d.domain == domain)

    assert own == pytest.approx(loss("sums", "sums"))
    assert whole == pytest.approx(loss("all", "sums"))
    assert gain == pytest.approx(-0.05)
    assert elsewhere == pytest.approx(loss("sums", "prose"))
    assert everywhere == pytest.approx(loss("all", "prose"))
    assert rows["random"][3] == 0


def test_layers_show_means_over_seeds(result: PruneBenchResult) -> None:
    section = layers_section(result)
    assert section is not None
    assert [chart.title.replace("\N{NO-BREAK SPACE}", " ") for chart in section.charts] == [
        "75 % of the experts",
        "50 % of the experts",
    ]
    half = section.charts[1]
    assert len(half.series) == 6
    assert [p.y for p in half.series[0].points] == [1.0, 2.0], "seeds add 0, 1 and 2 in the second layer"


def test_the_headline_names_the_best_and_the_findings_those_no_better_than_chance(result: PruneBenchResult) -> None:
    first = headline(result)
    assert first.status == "good"
    assert first.text.startswith("easy-ep loses least at 50")
    told = findings(result)
    assert any("75" in f.text and "easy-ep" in f.text for f in told)
    [poor] = [f for f in told if f.text.startswith("No better than random pruning at 75")]
    assert poor.text.endswith(": man.")
    assert any("Took no part: uncurl" in f.text for f in told)


def test_where_chance_costs_nothing_the_headline_says_so() -> None:
    quiet = headline(made({"random": -0.2, "frequency": -0.3, "reap": -0.4}))
    assert quiet.status == "bad"
    assert "costs nothing" in quiet.text


def test_no_share_of_chance_is_told_where_the_method_itself_loses_nothing() -> None:
    told = headline(made({"random": 1.0, "frequency": 0.5, "reap": -0.4}))
    assert told.text.startswith("reap loses least")
    assert "-0.4" in told.text
    assert "random pruning" not in told.text
    assert "random pruning" in headline(made()).text


def test_passages_of_one_document_are_told_and_judge_nothing(result: PruneBenchResult) -> None:
    one = result.model_copy(update={"cuts": (Cut(domain="prose", passages=6, documents=1),)})
    words = "prose: 6 passages of 1 document: intervals are too narrow."
    assert words in [f.text for f in findings(one)]
    assert headline(one).text == headline(result).text
    assert {headline(one).status, *(f.status for f in findings(one) if "no part" not in f.text)} == {"neutral"}
    page = Page(to_html(report(one)))
    told = " ".join(found for _, found in page.texts)
    assert "12 held-out documents and passages (prose: 6 passages of 1 document)" in told
    assert words in told
    some = result.model_copy(update={"cuts": (Cut(domain="prose", passages=6, documents=3),)})
    assert "prose: 6 passages of 3 documents: intervals are too narrow." in [f.text for f in findings(some)]
    assert headline(some).status == "good"
    text, *others = result.calibrations
    cut = result.model_copy(update={"calibrations": (text.model_copy(update={"passages": 31}), *others)})
    assert "20 documents, cut into 31 passages" in " ".join(x for _, x in Page(to_html(report(cut))).texts)


def test_the_page_needs_nothing_else_and_says_how_it_was_made(result: PruneBenchResult, tmp_path) -> None:
    page = Page(to_html(report(result, "moekit bench prune ./moe --data ./text")))
    links = [a.get("href", "") for a in page.every("a")]
    assert all(link.startswith("#") or link.endswith(".json") for link in links)
    assert not page.every("img")
    assert all(a["href"].startswith("data:") for a in page.every("link"))
    assert all("src" not in a for a in page.every("script"))
    words = " ".join(found for _, found in page.texts)
    assert "went through the model once for all methods together" in words
    assert "In 1 of 2 layers some experts were never chosen (most in layer 1: 2)" in words
    assert "uncurl took no part (all): layer 3: the router has no matrix" in words
    assert "moekit bench prune ./moe --data ./text" in words
    built = build(report(result), tmp_path)
    assert built.name == "report.html"


@pytest.mark.full
@pytest.mark.slow
def test_hostile_names_are_shown_as_they_are() -> None:
    names = {method: f"{HOSTILE[i % len(HOSTILE)]} {i}" for i, method in enumerate(COSTS)}
    page = Page(to_html(report(made(names=names))))
    assert len(page.scripts) == len(Page(to_html(report(made()))).scripts)
    heads = [found for tag, found in page.texts if tag == "th"]
    assert any(names["reap"] in head for head in heads)


def test_a_bench_of_random_alone_still_makes_a_page() -> None:
    alone = made({"random": 1.0})
    [section] = pareto_sections(alone)
    assert [s.name for s in section.charts[0].series] == ["random"]
    assert "random" in to_html(report(alone))


def test_a_bench_in_which_nothing_could_be_measured_says_so(result: PruneBenchResult) -> None:
    empty = result.model_copy(update={"runs": (), "rankings": ()})
    assert headline(empty).status == "bad"
    assert "No method could be measured" in to_html(report(empty))


def test_a_band_covers_what_lies_between_the_ends() -> None:
    points = (Point(x=0, y=2, y_low=1, y_high=4), Point(x=1, y=3))
    chart = LineChart(
        title="t", x=Axis(label="x"), y=Axis(label="y"), series=(Series(name="s", points=points, band=True),)
    )
    drawn = ET.fromstring(str(line_chart(chart)))
    [band] = [p for p in drawn.iter("path") if "band" in p.get("class", "")]
    corners = [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", band.get("d", ""))]
    assert len(corners) == 4
    (_, top), right, (_, again), (_, bottom) = corners
    assert top < bottom, "4 is drawn above 1"
    assert right == corners[2]
    assert again == right[1]
    assert not [p for p in drawn.iter("path") if "whisker" in p.get("class", "")]
