from __future__ import annotations

import numpy as np
import pytest

from moekit.errors import BadData, NumericFault
from moekit.evaluation.comparison import Evaluation, compare
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.questions import Metric, TaskResult
from moekit.report.parts import Interval
from moekit.report.sections.c2r import Curve, CurvePoint, curve_findings, curve_section, headline, key_figures
from moekit.report.sections.evaluations import comparison_section
from moekit.report.sections.placements import PlacementRow, placement_section
from moekit.report.sections.traces import (
    Coactivations,
    by_layer_section,
    coactivation_section,
    conditional,
    effective_partners,
    inside,
    load_section,
)

# Pairs (0,1) 6 times and (0,2) twice, (2,3) 4 times; the diagonal is the load.
COUNTS = np.array([[8, 6, 2, 0], [6, 6, 0, 0], [2, 0, 6, 4], [0, 0, 4, 4]])


def test_co_activation_is_shown_as_the_share_of_the_row_experts_tokens():
    shares = conditional(COUNTS.astype(float))
    assert shares[0].tolist() == [0, 0.75, 0.25, 0]
    assert shares[1].tolist() == [1, 0, 0, 0]
    assert shares.diagonal().tolist() == [0, 0, 0, 0]
    idle = COUNTS.copy().astype(float)
    idle[3], idle[:, 3] = 0, 0
    assert conditional(idle)[3].tolist() == [0, 0, 0, 0]


def test_share_inside_devices_and_effective_partners_by_hand():
    assert inside(COUNTS.astype(float), (2, 2)) == pytest.approx(10 / 12)
    # Entropies: (3/4, 1/4), none, (1/3, 2/3), none.
    expected = np.mean([np.exp(0.562335), 1, np.exp(0.636514), 1])
    assert effective_partners(COUNTS.astype(float)) == pytest.approx(expected, rel=1e-5)
    assert effective_partners(np.zeros((2, 2))) == 0


def test_heat_maps_follow_the_placements_order():
    panel = Coactivations("placed", {3: COUNTS}, {3: [2, 3, 0, 1]}, {3: [2, 2]})
    section = coactivation_section([Coactivations("as it is", {3: COUNTS}), panel])
    plain, placed = (p.layers[0] for p in section.panels)
    assert section.layers == ("Layer 3",)
    assert placed.names == ("2", "3", "0", "1")
    assert placed.values[2][3] == plain.values[0][1] == 0.75
    assert placed.blocks == (2, 2)
    assert "83.3" in placed.caption
    assert plain.blocks == ()


def test_orders_blocks_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(BadData, match="no permutation"):
        coactivation_section([Coactivations("p", {0: COUNTS}, {0: [0, 1, 2, 2]})])
    with pytest.raises(BadData, match="do not cover"):
        coactivation_section([Coactivations("p", {0: COUNTS}, None, {0: [2, 3]})])
    with pytest.raises(BadData, match="not square"):
        coactivation_section([Coactivations("p", {0: COUNTS[:2]})])
    with pytest.raises(BadData, match="has layers"):
        coactivation_section([Coactivations("p", {0: COUNTS}), Coactivations("q", {1: COUNTS})])


def test_loads_are_relative_to_an_even_share():
    section = load_section({"a": {0: [2, 2, 8, 0]}, "b": {0: [3, 3, 3, 3]}})
    [group] = section.groups
    assert group.series[0].values == pytest.approx((2 / 3, 2 / 3, 8 / 3, 0), abs=1e-5)
    assert group.series[1].values == (1, 1, 1, 1)
    assert "a: busiest 2.67 × mean" in group.caption
    assert "1 never chosen" in group.caption
    assert section.categories == ("0", "1", "2", "3")
    with pytest.raises(BadData, match="not 4 experts"):
        load_section({"a": {0: [2, 2, 8, 0]}, "b": {0: [3, 3, 3]}})
    with pytest.raises(BadData, match="not 4 experts"):
        load_section({"a": {0: [2, 2, 8, 0]}, "b": {1: [3, 3, 3, 3]}})


def test_lines_over_layers():
    section = by_layer_section(
        {"load CV": {"a": {1: 0.5, 0: 0.25, 2: float("nan")}}}, title="t", units={"load CV": "%"}
    )
    [chart] = section.charts
    assert [(p.x, p.y) for p in chart.series[0].points] == [(0, 0.25), (1, 0.5)]
    assert chart.y.unit == "%"


def test_placements_are_set_against_once_per_expert():
    rows = [
        PlacementRow(devices=d, routing="top-4", placement="best", sending="once per device", rows=3.0, per_expert=4.0)
        for d in (2, 4)
    ]
    section = placement_section(rows)
    assert [t.caption for t in section.tables] == ["2 devices", "4 devices"]
    assert section.tables[0].rows[0][3:5] == (3.0, -0.25)
    assert len(section.tables[0].columns) == 6
    solved = rows[0].model_copy(update={"solver": "exact", "gap": 0.0})
    assert section.tables[0].columns[-1].name != placement_section([solved]).tables[0].columns[-1].name


def test_comparisons_become_tables():
    text = {"domains": ("x", "x", "y", "y"), "tokens": (10, 10, 10, 10)}
    metric = {"acc": Metric(value=0.5, standard_error=0.1, answers=(1.0, 0.0))}
    better = {"acc": Metric(value=1.0, standard_error=0.0, answers=(1.0, 1.0))}
    tasks = [tuple(TaskResult(task=t, n=2, metrics=m, questions="q") for t in "tu") for m in (metric, better)]
    a = Evaluation(name="a", perplexity=PerplexityResult(nll=(20.0, 21.0, 30.0, 31.0), **text), tasks=tasks[0])
    b = Evaluation(name="b", perplexity=PerplexityResult(nll=(21.0, 23.0, 30.0, 31.0), **text), tasks=tasks[1])
    perplexity, choice = comparison_section([compare(a, b)]).tables
    assert [row[0] for row in perplexity.rows] == ["x", "y", "all"]
    assert perplexity.rows[0][5].mean == pytest.approx(np.exp(3 / 20) - 1)
    assert perplexity.rows[1][5].mean == 0
    assert [row[0] for row in choice.rows] == ["t", "u", "mean of tasks"]
    assert choice.rows[0][6:] == ("0 : 1", 1.0)
    assert choice.rows[2][3:5] == (0.5, 1.0)


def point(name, rows, saving, cost, kind="list", spread=0.002, alike=True):
    wide = {k: Interval(mean=v, low=v - spread, high=v + spread) for k, v in (("saving", saving), ("cost", cost))}
    return CurvePoint(name=name, kind=kind, rows=rows, trained_alike=alike, **wide)


def curve(*points, devices=4, placed=2.5, top_k=4):
    return Curve(devices=devices, top_k=top_k, placed=placed, contiguous=2.9, points=points)


SOUND = curve(
    point("T = 31", 2.5, 0.0, 0.0, spread=0),
    point("T = 8", 2.2, -0.12, 0.004),
    point("T = 4", 1.9, -0.24, 0.007),
    point("T = 3", 1.7, -0.32, 0.02),
    point("device first", 1.0, -0.6, 0.03, "device"),
)


def test_the_first_line_says_what_the_constraint_adds_beyond_placement_alone():
    said = headline([SOUND])
    nb = "\N{NO-BREAK SPACE}"
    assert said.text.replace(nb, " ") == (
        "Beyond placement alone, C2R (T = 4) sends 24.0 % fewer rows (paired 95 % interval 23.8 % to 24.2 %) between 4 "
        "devices, at 0.7 % higher perplexity (0.5 % to 0.9 %) than plain top-k fine-tuned alike."
    )
    assert said.status == "neutral", "it saves, and it costs"
    assert f"placement alone sends 37.5{nb}% fewer rows than once per expert" in said.detail


def test_the_first_line_speaks_of_training_only_where_there_was_any():
    untrained = curve(point("T = 31", 2.5, 0.0, 0.0, alike=False), point("T = 4", 1.9, -0.24, 0.007, alike=False))
    assert headline([untrained]).text.endswith("than plain top-k.")


def test_a_saving_without_measurable_cost_is_a_gain():
    assert headline([curve(point("T = 31", 2.5, 0, 0), point("T = 8", 2.2, -0.12, 0.001))]).status == "good"


def test_without_an_affordable_point_the_cheapest_is_told():
    dear = curve(point("T = 8", 2.2, -0.12, 0.05), point("T = 4", 1.9, -0.24, 0.09))
    assert dear.chosen().name == "T = 8"
    assert "No point surely costs" in headline([dear]).detail


def test_the_first_line_is_about_the_largest_number_of_devices_unless_told():
    eight = curve(point("T = 31", 3, 0, 0), point("T = 8", 2, -0.3, 0.001), devices=8, placed=3.0)
    assert "between 8 devices" in headline([SOUND, eight]).text
    assert "between 4 devices" in headline([SOUND, eight], devices=4).text


def test_a_flat_curve_is_told_as_a_finding():
    flat = curve(point("T = 31", 2.5, 0, 0, spread=0), point("T = 4", 2.49, -0.004, 0.001))
    assert headline([flat]).status == "neutral"
    assert "The curve is flat" in headline([flat]).text
    assert "0.4" in headline([flat]).text
    assert any("no point saves" in f.text for f in curve_findings([flat]))
    assert not any(f.status == "failure" for f in curve_findings([flat]))


def test_a_degenerate_curve_is_a_failure():
    stuck = curve(point("T = 31", 2.0, 0, 0), point("T = 4", 2.0, 0, 0.001), devices=2, placed=2.0)
    assert headline([stuck]).status == "failure"
    assert "touches every one of the 2 devices" in headline([stuck]).text
    assert [f.status for f in curve_findings([SOUND, stuck])].count("failure") == 1


def test_device_first_alone_does_not_make_a_curve_vary():
    stuck = curve(point("T = 4", 2.5, 0, 0.001), point("device first", 1.0, -0.6, 0.03, "device"))
    assert "same 2.5000 rows" in stuck.failure()


def test_costs_are_told():
    [told] = curve_findings([SOUND])
    assert told.status == "bad"
    assert told.text.startswith("4 of 5 points cost measurable perplexity")
    free = curve(point("T = 31", 2.5, 0, 0), point("T = 8", 2.2, -0.12, 0.001))
    assert "No point of the curve costs" in curve_findings([free])[0].text


def test_the_chart_and_key_figures_show_the_same_points():
    [chart] = curve_section([SOUND]).charts
    names = [s.name for s in chart.series]
    assert names == ["plain top-k, best placement", "C2R, partner lists", "C2R, device first"]
    assert [p.label for p in chart.series[1].points] == ["T = 3", "T = 4", "T = 8", "T = 31"], "by rows"
    four = chart.series[1].points[1]
    assert (four.x, four.y, four.y_low) == (1.9, 0.007, pytest.approx(0.005))
    assert (four.x_low, four.x_high) == pytest.approx((1.9 - 0.005, 1.9 + 0.005))
    [figure] = key_figures([SOUND])
    assert figure.value == "4 → 2.50 → 1.90"


def test_nan_in_a_curve_is_a_numeric_fault():
    with pytest.raises(NumericFault):
        point("T = 4", float("nan"), -0.1, 0.0)
