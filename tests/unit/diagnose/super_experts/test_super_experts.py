"""Super experts: the worked example, exact identities, and planted ones that must be found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from transformers import PreTrainedModel

from moekit.anatomy import Geometry, find_moe_layers
from moekit.compress.engine.dropping import keep_highest
from moekit.compress.engine.inputs import LayerInputs
from moekit.diagnose.super_experts.ablation import without_experts
from moekit.diagnose.super_experts.finding import (
    NEEDS,
    SHARED,
    SuperExpertReport,
    find_super_experts,
    forms_massive,
    profile_super_experts,
)
from moekit.diagnose.super_experts.magnitudes import stream_magnitude
from moekit.errors import BadConfig, BadData, NumericFault
from moekit.trace import LayerStatistics, record
from moekit.trace.batch import TokenBatch
from tests.families import build, tokens
from tests.planted import PLANTED, plant, random_model, text

CODE = {"scope": "first-75", "forming": "first-75"}
PAPER = {"scope": "model", "forming": "first-75"}
OUTLIERS = {(1, 7): 700.0, (2, 3): 400.0, (3, 9): 60.0, (7, 4): 900.0}


def peaks(values: torch.Tensor) -> torch.Tensor:
    """[E, 3] with channel 2 and position 0."""
    return torch.stack([values.double(), torch.full_like(values, 2).double(), torch.zeros_like(values).double()], 1)


def example(
    outliers: Mapping[tuple[int, int], float] = OUTLIERS, layers: int = 8, experts: int = 50, factor: float = 1.0
) -> dict[int, LayerStatistics]:
    """All maxima 1 but the outliers."""
    maxima = torch.ones(layers, experts)
    for place, value in outliers.items():
        maxima[place] = value
    return {
        n: LayerStatistics(experts, 4, tokens=9, values={"output_peak": peaks(row)})
        for n, row in enumerate(maxima * factor)
    }


def test_the_codes_rule_by_hand() -> None:
    report = find_super_experts(example(), **CODE)
    # 300 maxima of 6 layers: rank 297.505 lies between 60 and 400.
    assert report.percentile == pytest.approx(60 + 0.505 * 340)
    assert report.percentile == pytest.approx(231.7)
    assert report.largest == 700
    assert report.pairs == [(1, 7), (2, 3)]
    assert report.protected == {1: frozenset({7}), 2: frozenset({3})}
    assert report.mask(1).nonzero().flatten().tolist() == [7]
    assert not report.mask(5).any()
    first = report.found[0]
    assert (first.value, first.channel, first.position, first.forms, first.large) == (700, 2, 0, True, True)
    assert first.over_percentile == pytest.approx(700 / 231.7)
    assert first.over_ratio == pytest.approx(10)
    assert [(c.layer, c.expert, c.large, c.forms) for c in report.others[:2]] == [
        (7, 4, True, False),
        (3, 9, False, True),
    ]
    assert report.room == 2
    assert report.verdict == "super experts: 7 of layer 1, 3 of layer 2"


def test_the_papers_rule_by_hand() -> None:
    report = find_super_experts(example(), **PAPER)
    # 400 maxima: rank 397.005 lies just above 400, and the late outlier of 900 is the largest.
    assert report.percentile == pytest.approx(400 + 0.005 * 300)
    assert report.percentile == pytest.approx(401.5)
    assert report.largest == 900
    assert report.pairs == [(1, 7)]


def test_the_first_three_quarters_are_rounded_as_the_code_rounds() -> None:
    late = {(6, 0): 500.0}
    assert find_super_experts(example(late), **CODE, decoder_layers=8).pairs == []
    assert find_super_experts(example(late), **CODE, decoder_layers=9).pairs == [(6, 0)]  # round(6.75) = 7


def test_idle_experts_count_as_0_and_shared_ones_take_part() -> None:
    statistics = example({(1, 7): 700.0})
    for layer, stats in statistics.items():
        unseen = stats["output_peak"].clone()
        unseen[20:] = torch.tensor([0.0, -1.0, -1.0])
        shared = torch.tensor([800.0 if layer == 2 else 1.0, 3.0, 1.0], dtype=torch.float64)
        statistics[layer] = LayerStatistics(50, 4, tokens=9, values={"output_peak": unseen, "shared_peak": shared})
    report = find_super_experts(statistics, **CODE)
    assert report.pairs == [(1, 7), (2, SHARED)]
    assert report.protected == {1: frozenset({7})}  # pruners have no shared expert to protect
    assert (report.found[1].channel, report.found[1].position) == (3, 1)
    assert report.layers[2].shared == 800
    assert "shared of layer 2" in report.verdict
    # 306 maxima of 6 layers, 2 of them large: rank 303.475 lies between 1 and 700.
    assert report.percentile == pytest.approx(1 + 0.475 * 699)


def test_few_maxima_leave_room_for_one() -> None:
    report = find_super_experts(example({(1, 3): 5600.0, (1, 4): 5599.0}, layers=24, experts=8), **PAPER)
    assert report.room == 1
    assert report.pairs == [(1, 3)]


random_maxima = st.lists(st.floats(0, 1e4, allow_nan=False, width=32), min_size=60, max_size=60)


def of_list(values: list[float], factor: float = 1.0) -> dict[int, LayerStatistics]:
    return example({divmod(i, 10): v for i, v in enumerate(values)}, layers=6, experts=10, factor=factor)  # type: ignore


@settings(max_examples=40, deadline=None)
@given(values=random_maxima, low=st.floats(0, 100), step=st.floats(0, 30), share=st.floats(0, 1), more=st.floats(0, 1))
def test_the_set_shrinks_as_thresholds_rise(
    values: list[float], low: float, step: float, share: float, more: float
) -> None:
    def pairs(percentile: float, ratio: float) -> set[tuple[int, int]]:
        return set(find_super_experts(of_list(values), percentile=percentile, ratio=ratio, **PAPER).pairs)

    loose = pairs(low, share)
    assert pairs(min(low + step, 100), share) <= loose
    assert pairs(low, min(share + more, 1)) <= loose
    assert pairs(100, 0) == set()


@settings(max_examples=40, deadline=None)
@given(values=random_maxima, exponent=st.integers(-9, 9))
def test_the_unit_of_the_maxima_does_not_matter(values: list[float], exponent: int) -> None:
    base = find_super_experts(of_list(values), percentile=90, **CODE)
    assert find_super_experts(of_list(values, 2.0**exponent), percentile=90, **CODE).pairs == base.pairs


def forming(gain: float, stream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics of a layer's residual stream [N, H] whose block adds `gain` at channel 1, position 3."""
    seen = TokenBatch(1, torch.zeros(len(stream), 1, dtype=torch.int64), stream=stream)
    place = torch.tensor([gain, 1.0, 3.0], dtype=torch.float64)
    return {"stream_gain": place, "stream_peak": place, "stream_magnitude": stream_magnitude(seen)}


def test_only_layers_that_form_count_and_they_extend_the_scope() -> None:
    statistics = example()
    quiet, ones = torch.full((5, 8), 0.1), torch.ones(5, 8)
    gains = {1: (101.0, quiet), 2: (101.0, ones), 3: (99.0, quiet), 7: (5000.0, ones)}
    for layer, stats in statistics.items():
        values = {**stats, **forming(*gains.get(layer, (0.0, quiet)))}
        statistics[layer] = LayerStatistics(50, 4, tokens=9, values=values)
    report = find_super_experts(statistics)
    assert [n for n, layer in report.layers.items() if layer.forms] == [1, 7]
    assert [n for n, layer in report.layers.items() if layer.compared] == [0, 1, 2, 3, 4, 5, 7]
    assert report.layers[1].gain == (101.0, 1, 3)
    assert report.layers[1].median == pytest.approx(0.1, rel=0.03)
    # 350 maxima: rank 347.255 lies between 400 and 700.
    assert report.percentile == pytest.approx(400 + 0.255 * 300)
    assert report.pairs == [(1, 7), (7, 4)]
    assert find_super_experts(statistics, scope="formation").room == 1  # 100 maxima


def test_a_gain_must_be_massive_itself() -> None:
    assert forms_massive(101, 0.1)
    assert not forms_massive(100, 0.01)
    assert not forms_massive(101, 0.102)


def test_what_was_not_recorded_is_named() -> None:
    with pytest.raises(BadData, match="stream_gain and stream_magnitude") as caught:
        find_super_experts(example())
    assert caught.value.layer == 0
    with pytest.raises(BadData, match="output_peak"):
        find_super_experts({3: LayerStatistics(4, 4)}, **CODE)
    with pytest.raises(BadData, match="no statistics"):
        find_super_experts({})
    with pytest.raises(ValidationError):
        find_super_experts(example(), percentile=101, **CODE)


def test_infinite_outputs_are_named() -> None:
    with pytest.raises(NumericFault) as caught:
        find_super_experts(example({(2, 5): float("inf")}), **CODE)
    assert (caught.value.layer, caught.value.expert) == (2, 5)


def test_silence_is_explained() -> None:
    equal = find_super_experts(example({}), **CODE)
    assert equal.pairs == []
    assert "exceeds both 1 and 0.1 x 1" in equal.verdict
    late = find_super_experts(example({(7, 4): 900.0}), **PAPER)
    assert late.verdict.endswith("form none (4 of layer 7)")
    idle = find_super_experts(example({}, factor=0.0), **CODE)
    assert idle.pairs == []
    assert idle.others[0].over_percentile is None


def test_a_report_survives_the_disk_and_knows_its_model(tmp_path: Path) -> None:
    report = find_super_experts(example(), **CODE, model="a", fingerprint="1234")
    report.save(tmp_path / "report.json")
    assert SuperExpertReport.load(tmp_path / "report.json") == report
    report.check_model("1234")
    with pytest.raises(BadConfig, match="1234"):
        report.check_model("5678")
    with pytest.raises(BadData, match="no report"):
        SuperExpertReport.load(tmp_path / "none.json")
    (tmp_path / "report.json").write_text('{"format": 1}')
    with pytest.raises(BadData, match="damaged report"):
        SuperExpertReport.load(tmp_path / "report.json")


def test_pruners_keep_what_the_report_protects() -> None:
    protected = find_super_experts(example(), **CODE).protected
    worst_last = torch.arange(50, 0, -1).double()
    stats = LayerStatistics(50, 4, tokens=9, values={"load": torch.ones(50, dtype=torch.int64)})
    geometry = Geometry(4, 50, 2, 4, 0, True, False, False, True)
    for layer, kept in ((0, (0, 1, 2)), (1, (0, 1, 7)), (2, (0, 1, 3))):
        inputs = LayerInputs(layer, geometry, stats, protected=protected.get(layer, frozenset()))
        assert keep_highest(worst_last, 3, inputs) == kept


@contextmanager
def largest_by_layer(model: PreTrainedModel) -> Iterator[dict[int, float]]:
    found: dict[int, float] = {}
    hooks = [
        decoder.register_forward_hook(
            lambda m, a, out, n=n: found.__setitem__(n, float((out[0] if isinstance(out, tuple) else out).abs().max()))
        )
        for n, decoder in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_experts_are_found_on_any_text(seed: int) -> None:
    model = random_model(seed)
    plant(model)
    for corpus in (1, 2):
        report = profile_super_experts(model, [text(corpus)])
        assert report.pairs == [(1, 7), (2, 40)]
        assert [round(c.value, -2) for c in report.found] == [1000, 600]
        # Once the first token is blown up, attention hands some of it on: the second expert meets it elsewhere too.
        assert [c.channel for c in report.found] == [6, 7]
        assert report.found[0].position == 0
        assert [n for n, layer in report.layers.items() if layer.forms] == [1, 2]
        assert report.tokens == 6 * 24
    assert profile_super_experts(model, [text(1)], forming="first-75").pairs == [(1, 7), (2, 40)]
    with largest_by_layer(model) as whole:
        model(input_ids=text(1), use_cache=False)
    with largest_by_layer(model) as without, without_experts(model, list(PLANTED)):
        model(input_ids=text(1), use_cache=False)
    assert whole[0] < 1
    assert whole[1] > 500
    assert max(without.values()) < 1


def test_profiling_in_two_halves_is_profiling_once() -> None:
    model = random_model(3)
    plant(model)
    whole, *halves = (
        record(model, [part], statistics=NEEDS, keep_choices=False).statistics for part in (text(1), *text(1).chunk(2))
    )
    assert whole is not None
    assert halves[0] is not None
    assert halves[1] is not None
    once, twice = find_super_experts(whole), find_super_experts(halves[0].merge(halves[1]))
    assert once.pairs == twice.pairs == [(1, 7), (2, 40)]
    for layer, profile in once.layers.items():
        torch.testing.assert_close(torch.tensor(twice.layers[layer].maxima), torch.tensor(profile.maxima))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_model_has_none_and_only_the_streams_condition_says_so(seed: int) -> None:
    model = random_model(seed)
    report = profile_super_experts(model, [text(1)])
    assert report.pairs == []
    assert report.verdict == "no super expert: no layer forms a massive activation"
    assert any(candidate.large for candidate in report.others)
    # Without the condition some arbitrary experts pass.
    assert profile_super_experts(model, [text(1)], forming="first-75").pairs


def test_shared_experts_are_profiled_where_there_are_some() -> None:
    model = build("qwen2_moe")
    layer = find_moe_layers(model)[1]
    with torch.no_grad():
        layer.shared[0].down_proj.weight[4] *= 1e5
    report = profile_super_experts(model, [tokens()])
    assert report.pairs == [(1, SHARED)]
    assert report.found[0].channel == 4
    assert report.protected == {}
    assert report.fingerprint
