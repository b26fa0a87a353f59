"""Families and histograms of gates and norms, by hand and against loops."""

from __future__ import annotations

import itertools

import pytest
import torch

import moekit.trace.power  # noqa: F401 - enters the family
from moekit.errors import BadConfig
from moekit.trace.observation import Observation
from moekit.trace.ratios import gate_ratio, median
from moekit.trace.renormalised import share_NK
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import BINS, get, resolve


def measured(seen: Observation, *names: str, hidden: int = 2) -> LayerStatistics:
    stats = LayerStatistics.empty(resolve(names), seen.experts, hidden)
    stats.update(seen)
    return stats


def example() -> Observation:
    """EASY-EP's two tokens: w = 0.2 and 0, E = 4 of which the last is never chosen."""
    weights_NK = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    outputs_NKH = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]])
    return Observation(
        4,
        torch.tensor([[0, 1], [1, 2]]),
        weights=weights_NK,
        outputs=outputs_NKH,
        residual=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        routed=(weights_NK[..., None] * outputs_NKH).sum(1),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("power(0,0,0)", [1, 2, 1, 0]),
        ("power(0,1,0)", [0.75, 0.75, 0.5, 0]),
        ("power(0,0,1)", [2, 4 + 2**0.5, 8**0.5, 0]),
        ("power(0,0,2)", [4, 18, 8, 0]),
        ("power(0,1,1)", [1.5, 1 + 0.5 * 2**0.5, 0.5 * 8**0.5, 0]),
        ("power(1,0,0)", [0.2, 0.2, 0, 0]),
        ("power(1,1,1)", [0.3, 0.2, 0, 0]),
        ("power(0.5,2,0)", [0.2**0.5 * 0.75**2, 0.2**0.5 * 0.25**2, 0, 0]),
        ("power(0,0.5,0.5)", [1.5**0.5, 1 + (0.5 * 2**0.5) ** 0.5, (0.5 * 8**0.5) ** 0.5, 0]),
    ],
)
def test_members_by_hand(name: str, expected: list[float]) -> None:
    # w = 1 - cos comes out of fp32, so the root of a w of 0 may be off by the root of its rounding.
    assert measured(example(), name)[name].tolist() == pytest.approx(expected, abs=4e-4)


def test_members_against_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    indices_NK = torch.rand(30, 5, generator=g).topk(3).indices
    indices_NK[4, 2] = 5  # no expert
    seen = Observation(
        5,
        indices_NK,
        weights=torch.rand(30, 3, generator=g),
        outputs=torch.randn(30, 3, 4, generator=g),
        residual=torch.randn(30, 4, generator=g),
        routed=torch.randn(30, 4, generator=g),
    )
    assert seen.weights is not None
    assert seen.outputs is not None
    for a, b, c in itertools.product((0, 1), (0, 1, 1.5), (0, 2)):
        expected = [0.0] * 5
        for token, slot in itertools.product(range(30), range(3)):
            if (expert := int(indices_NK[token, slot])) < 5:
                w, gate = float(seen.change_N[token]), float(seen.weights[token, slot])
                norm = float(seen.outputs[token, slot].double().square().sum().sqrt())
                expected[expert] += w**a * gate**b * norm**c
        name = f"power({a:g},{b:g},{c:g})"
        assert measured(seen, name, hidden=4)[name].tolist() == pytest.approx(expected, rel=1e-5)


def test_zero_to_the_zero_is_one() -> None:
    seen = Observation(2, torch.tensor([[0, 1]]), weights=torch.zeros(1, 2), outputs=torch.zeros(1, 2, 3))
    stats = measured(seen, "power(0,0,0)", "power(0,1,0)", "power(0,0,1)")
    assert [value.tolist() for value in stats.values()] == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("power(0,0,0)", {"choices"}),
        ("power(0,2,0)", {"weights"}),
        ("power(0,0,1)", {"outputs"}),
        ("power(1,0,0)", {"residual"}),
        ("power(1,1,1)", {"residual", "weights", "outputs"}),
    ],
)
def test_only_what_an_exponent_asks_for_is_read(name: str, sources: set[str]) -> None:
    entry = get(name)
    assert set(entry.sources) == sources
    assert (entry.name, entry.shape, entry.rule, entry.integer) == (name, "E", "sum", False)
    assert entry.doc.endswith(".")


def test_members_merge() -> None:
    one = measured(example(), "power(0,1,2)")
    assert torch.equal(one.merge(one)["power(0,1,2)"], 2 * one["power(0,1,2)"])


@pytest.mark.parametrize("name", ["power(-1,0,0)", "power(1,2)", "power(0,0,0,0)"])
def test_impossible_members_are_refused(name: str) -> None:
    with pytest.raises(BadConfig, match="power"):
        get(name)


# Renormalised gates


def test_shares_of_a_token_sum_to_one() -> None:
    weights_NK = torch.tensor([[0.6, 0.2], [5.0, 0.3], [0.0, 0.0]])
    seen = Observation(4, torch.tensor([[0, 1], [2, 4], [0, 3]]), weights=weights_NK)
    # In the second token the other choice is none, in the third no gate is open.
    torch.testing.assert_close(share_NK(seen), torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]]))


def test_renormalised_norms_by_hand() -> None:
    outputs_NKH = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [6.0, 8.0]]])
    weights_NK = torch.tensor([[0.6, 0.2], [0.1, 0.3]])
    seen = Observation(3, torch.tensor([[0, 1], [1, 0]]), weights=weights_NK, outputs=outputs_NKH)
    stats = measured(seen, "renormalised_output_norm")
    assert stats["renormalised_output_norm"].tolist() == pytest.approx([0.75 * 5 + 0.75 * 10, 0.25 + 0.25 * 2, 0])


# Ratios of gates


def test_ratios_are_counted_in_bins() -> None:
    # 0.25 = 128/512 and 0.5 = 256/512 open their bins, 1 is in the last; order of choices does not matter.
    weights_NK = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.5, 0.5], [2.0, 1.0], [1.0, 0.0], [1.0, 0.7]])
    indices_NK = torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1], [0, 1], [0, 3]])  # the last has one expert only
    counts_B = measured(Observation(3, indices_NK, weights=weights_NK), "gate_ratio")["gate_ratio"]
    assert counts_B.dtype == torch.int64
    assert counts_B.shape == (BINS,)
    assert {b: int(counts_B[b]) for b in counts_B.nonzero().flatten().tolist()} == {128: 2, 256: 1, 511: 1}


def test_ratios_of_one_choice_are_none() -> None:
    assert int(gate_ratio(Observation(3, torch.tensor([[0]]), weights=torch.ones(1, 1))).sum()) == 0


@pytest.mark.parametrize("tokens", [1, 2, 501, 1000])
def test_the_median_is_exact_to_a_bin(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    weights_NK = torch.rand(tokens, 2, generator=g)
    seen = Observation(4, torch.tensor([[0, 1]]).expand(tokens, 2), weights=weights_NK)
    exact = float((weights_NK.amin(1) / weights_NK.amax(1)).median())  # the lower of the two middle ones
    assert abs(median(measured(seen, "gate_ratio")["gate_ratio"]) - exact) <= 0.5 / BINS + 1e-6


def test_parts_of_the_data_give_the_same_histogram() -> None:
    weights_NK = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    indices_NK = torch.tensor([[0, 1]]).expand(60, 2)
    parts = [
        measured(Observation(2, indices_NK[rows], weights=weights_NK[rows]), "gate_ratio")
        for rows in (slice(0, 13), slice(13, 60))
    ]
    whole = measured(Observation(2, indices_NK, weights=weights_NK), "gate_ratio")
    assert torch.equal(parts[0].merge(parts[1])["gate_ratio"], whole["gate_ratio"])


def test_the_median_of_nothing() -> None:
    with pytest.raises(ValueError, match="empty"):
        median(torch.zeros(BINS, dtype=torch.int64))
