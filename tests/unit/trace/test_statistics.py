"""Statistics against hand-worked numbers and definitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics, Statistics, coactivation, load
from moekit.trace.vocabulary import GROUPS, get, known_statistics, resolve, sources_of, statistic


def measured(seen: TokenBatch, *names: str, hidden: int = 4, domains: tuple[str, ...] = ("a",)) -> LayerStatistics:
    stats = LayerStatistics.empty(resolve(names), seen.experts, hidden, domains)
    stats.update(seen)
    return stats


def test_coactivation_of_the_worked_example() -> None:
    pairs_NK = torch.tensor([[0, 2], [0, 2], [2, 0], [0, 3], [3, 1], [1, 0]])
    counts_EE = coactivation(pairs_NK, 4)
    assert counts_EE[0].tolist() == [5, 1, 3, 1]
    assert torch.equal(counts_EE, counts_EE.T)
    assert torch.equal(counts_EE.diagonal(), load(pairs_NK, 4))
    assert int(counts_EE.triu(1).sum()) == 6


def test_coactivation_counts_what_a_loop_counts_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.trace.statistics.CHUNK_TOKENS", 7)
    choices_NK = torch.rand(100, 6, generator=torch.Generator().manual_seed(0)).topk(3).indices
    expected_EE = torch.zeros(6, 6, dtype=torch.int64)
    for row in choices_NK.tolist():
        for i, j in itertools.product(row, row):
            expected_EE[i, j] += 1
    assert torch.equal(coactivation(choices_NK, 6), expected_EE)


def test_no_expert_is_counted_nowhere() -> None:
    choices_NK = torch.tensor([[0, 4], [4, 4], [1, 0]], dtype=torch.uint8)  # E = 4 means none
    assert load(choices_NK, 4).tolist() == [2, 1, 0, 0]
    assert coactivation(choices_NK, 4)[0].tolist() == [2, 1, 0, 0]
    seen = TokenBatch(4, choices_NK.long(), weights=torch.tensor([[0.7, 9.0], [9.0, 9.0], [0.6, 0.4]]))
    assert measured(seen, "gate_mass")["gate_mass"].tolist() == pytest.approx([1.1, 0.6, 0, 0])


def test_scores_of_pruning_baselines() -> None:
    """Five tokens, E = 4, K = 2, weights renormalised, output norms constant 1, 2, 3, 10."""
    scores_NE = torch.tensor(
        [
            [0.5, 0.3, 0.15, 0.05],
            [0.6, 0.2, 0.15, 0.05],
            [0.45, 0.35, 0.1, 0.1],
            [0.1, 0.3, 0.2, 0.4],
            [0.4, 0.3, 0.2, 0.1],
        ]
    )
    chosen_NK = scores_NE.topk(2).indices
    weights_NK = scores_NE.gather(1, chosen_NK)
    weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
    norms_E = torch.tensor([1.0, 2.0, 3.0, 10.0])
    outputs_NKH = norms_E[chosen_NK].unsqueeze(-1) * torch.tensor([0.6, 0.0, -0.8])
    seen = TokenBatch(4, chosen_NK, weights=weights_NK, logits=scores_NE.log(), outputs=outputs_NKH)
    names = ("load", "soft_frequency", "gate_mass", "output_norm", "output_square", "gated_output_norm", "first_load")
    stats = measured(seen, *names, hidden=3)
    assert stats["load"].tolist() == [4, 5, 0, 1]
    assert stats["soft_frequency"].tolist() == pytest.approx([2.05, 1.45, 0.80, 0.70])
    assert stats["gate_mass"].tolist() == pytest.approx([2.5089286, 1.9196429, 0, 0.5714286])
    assert stats["output_norm"].tolist() == pytest.approx([4, 10, 0, 10])
    assert stats["output_square"].tolist() == pytest.approx([4, 20, 0, 100])
    assert stats["gated_output_norm"].tolist() == pytest.approx([2.5089286, 3.8392857, 0, 5.7142857])
    assert stats["first_load"].tolist() == [4, 0, 0, 1]
    assert stats.never_routed == [2]


def test_scores_of_a_sigmoid_router() -> None:
    logits_NE = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    seen = TokenBatch(2, torch.tensor([[1], [0]]), logits=logits_NE, sigmoid=True)
    expected = [0.5 + 0.7310585786, 0.8807970779 + 0.2689414213]
    assert measured(seen, "soft_frequency")["soft_frequency"].tolist() == pytest.approx(expected)


def test_easy_ep_worked_example() -> None:
    residual_NH = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    chosen_NK = torch.tensor([[0, 1], [1, 2]])
    weights_NK = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    outputs_NKH = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]])
    routed_NH = (weights_NK.unsqueeze(-1) * outputs_NKH).sum(1)
    assert routed_NH.tolist() == [[1.0, 1.5], [1.5, 1.5]]
    seen = TokenBatch(3, chosen_NK, weights=weights_NK, outputs=outputs_NKH, residual=residual_NH, routed=routed_NH)
    # cos((1, 0), (2, 1.5)) = 0.8
    stats = measured(
        seen, "residual_change_weighted_output_norm", "residual_change", "residual_max", "gated_output_norm", hidden=2
    )
    assert stats["residual_change_weighted_output_norm"].tolist() == pytest.approx([0.30, 0.20, 0.0], abs=1e-6)
    assert float(stats["residual_change"]) == pytest.approx(0.2, abs=1e-6)
    assert float(stats["residual_max"]) == 1.0
    assert stats["gated_output_norm"].tolist() == pytest.approx([1.5, 1.7071068, 1.4142136])


def test_inputs_count_routed_tokens_only() -> None:
    hidden_NH = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])
    seen = TokenBatch(3, torch.tensor([[0], [1], [0]]), hidden=hidden_NH)
    stats = measured(seen, "input_sum", "input_square", "input_norm", hidden=2)
    assert stats["input_sum"].tolist() == [[1.5, 2.0], [3.0, -4.0], [0.0, 0.0]]
    assert stats["input_square"].tolist() == [[1.25, 4.0], [9.0, 16.0], [0.0, 0.0]]
    assert stats["input_norm"].tolist() == pytest.approx([5**0.5 + 0.5, 5.0, 0.0])


def test_peak_names_value_channel_and_position() -> None:
    outputs_NKH = torch.zeros(3, 1, 4)
    outputs_NKH[0, 0, 1], outputs_NKH[2, 0, 3] = 2.0, -5.0
    seen = TokenBatch(2, torch.zeros(3, 1, dtype=torch.int64), outputs=outputs_NKH, position=torch.tensor([0, 1, 7]))
    stats = measured(seen, "output_peak")
    assert stats["output_peak"].tolist() == [[5.0, 3.0, 7.0], [0.0, -1.0, -1.0]]
    outputs_NKH[1, 0, 0] = 6.0
    stats.update(seen.__class__(2, seen.indices_NK, outputs=outputs_NKH, position=torch.tensor([10, 11, 12])))
    assert stats["output_peak"].tolist()[0] == [6.0, 0.0, 11.0]


def test_the_earlier_of_two_equal_peaks_stays() -> None:
    peaks = []
    for position in (3, 8):
        outputs_NKH = torch.full((1, 1, 4), 2.0)
        seen = TokenBatch(
            1, torch.zeros(1, 1, dtype=torch.int64), outputs=outputs_NKH, position=torch.tensor([position])
        )
        peaks.append(measured(seen, "output_peak"))
    assert peaks[0].merge(peaks[1])["output_peak"].tolist() == [[2.0, 0.0, 3.0]]


def test_forbidden_logits_leave_moments_finite() -> None:
    logits_NE = torch.tensor([[1.0, float("-inf"), 2.0]])
    seen = TokenBatch(3, torch.tensor([[2]]), logits=logits_NE)
    stats = measured(seen, "router")
    for name, value in stats.items():
        assert bool(value.isfinite().all()), name
    assert stats["soft_frequency"][1] == 0
    assert stats["logit_gram"].tolist() == [[1, 0, 2], [0, 0, 0], [2, 0, 4]]


def test_autocast_does_not_round_counts() -> None:
    choices_NK = torch.zeros(1001, 1, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = TokenBatch(2, choices_NK, domain=torch.zeros(1001), domains=1)
        stats = measured(seen, "basic")
    assert stats["coactivation"].tolist() == [[1001, 0], [0, 0]]
    assert stats["domain_load"].tolist() == [[1001, 0]]


def test_no_tokens_leave_zeros_and_no_nan() -> None:
    names = tuple(known_statistics())
    stats = LayerStatistics.empty(resolve(names), 3, 4, ("a",))
    stats.update(TokenBatch(3, torch.zeros(0, 2, dtype=torch.int64)))
    assert stats.tokens == 0
    for name, value in stats.items():
        assert bool(value.isfinite().all()), name
        assert value.shape == stats.shape(get(name))


def test_domains_of_two_runs_are_matched_by_name() -> None:
    first = measured(
        TokenBatch(2, torch.tensor([[0], [1]]), domain=torch.tensor([0, 1]), domains=2),
        "domain_load",
        domains=("a", "b"),
    )
    second = measured(
        TokenBatch(2, torch.tensor([[0], [0]]), domain=torch.tensor([0, 1]), domains=2),
        "domain_load",
        domains=("b", "c"),
    )
    both = first.merge(second)
    assert both.domains == ("a", "b", "c")
    assert both["domain_load"].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert both.tokens == 4


def test_other_statistics_do_not_add_up() -> None:
    seen = TokenBatch(3, torch.tensor([[0]]))
    with pytest.raises(BadData, match="do not add up"):
        measured(seen, "load").merge(measured(seen, "load", "coactivation"))
    with pytest.raises(BadData, match="do not add up"):
        measured(seen, "load").merge(measured(TokenBatch(4, torch.tensor([[0]])), "load"))


def test_warnings_name_layers_and_experts() -> None:
    seen = TokenBatch(3, torch.tensor([[0], [2]]))
    found = Statistics({5: measured(seen, "coactivation"), 2: LayerStatistics.empty(resolve(["load"]), 3, 4)})
    assert found.warnings == ["layer 2: no tokens", "layer 5: 1 of 3 experts never routed in 2 tokens: 1"]
    assert list(found) == [2, 5]


def test_every_statistic_is_documented_and_every_group_known() -> None:
    for entry in known_statistics().values():
        assert entry.doc.endswith("."), entry.name
        assert set(entry.shape) <= set("EHIDBV")
    for group in GROUPS:
        assert resolve([group])


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(BadConfig, match="coactivaton") as caught:
        resolve(["coactivaton"])
    assert caught.value.hint is not None
    assert "coactivation" in caught.value.hint
    stats = LayerStatistics.empty(resolve(["load"]), 3, 4)
    with pytest.raises(BadConfig):
        stats["lod"]
    with pytest.raises(KeyError):
        stats["coactivation"]


def test_what_asks_to_keep_choices_is_no_statistic() -> None:
    assert [entry.name for entry in resolve(["choices", "weights", "load", "basic"])] == [
        "load",
        "coactivation",
        "domain_load",
    ]
    assert sources_of(resolve(["gated_output_norm"])) == {"weights", "outputs"}


def test_a_package_adds_a_statistic_and_cannot_take_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.trace.vocabulary._statistics", dict(known_statistics()))

    @statistic(shape="E", sources=("weights",))
    def gate_cube(seen: TokenBatch) -> torch.Tensor:
        """Sum of cubed gate weights."""
        return seen.per_expert(seen.weights_NK**3)

    stats = measured(TokenBatch(2, torch.tensor([[0], [0]]), weights=torch.tensor([[2.0], [1.0]])), "gate_cube")
    assert stats["gate_cube"].tolist() == [9.0, 0.0]

    def load(seen: TokenBatch) -> torch.Tensor:
        """Another load."""
        return seen.indices_NK

    with pytest.raises(BadConfig, match="two statistics"):
        statistic(shape="E")(load)


def test_reading_what_was_not_recorded_is_named() -> None:
    with pytest.raises(LookupError, match="logits were not recorded"):
        measured(TokenBatch(2, torch.tensor([[0]])), "soft_frequency")
