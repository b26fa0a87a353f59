"""Sums of powers and of renormalised gates, by hand and against loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from moekit.compress.prune.reap import share_NK
from moekit.errors import BadConfig
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import get, resolve


def measured(seen: TokenBatch, *names: str, hidden: int = 2) -> LayerStatistics:
    stats = LayerStatistics.empty(resolve(names), seen.experts, hidden)
    stats.update(seen)
    return stats


def example() -> TokenBatch:
    """EASY-EP's two tokens: w = 0.2 and 0, E = 4 of which the last is never chosen."""
    weights_NK = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    outputs_NKH = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]])
    return TokenBatch(
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
    seen = TokenBatch(
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
    seen = TokenBatch(2, torch.tensor([[0, 1]]), weights=torch.zeros(1, 2), outputs=torch.zeros(1, 2, 3))
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
    seen = TokenBatch(4, torch.tensor([[0, 1], [2, 4], [0, 3]]), weights=weights_NK)
    # In the second token the other choice is none, in the third no gate is open.
    torch.testing.assert_close(share_NK(seen), torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]]))


def test_renormalised_norms_by_hand() -> None:
    outputs_NKH = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [6.0, 8.0]]])
    weights_NK = torch.tensor([[0.6, 0.2], [0.1, 0.3]])
    seen = TokenBatch(3, torch.tensor([[0, 1], [1, 0]]), weights=weights_NK, outputs=outputs_NKH)
    stats = measured(seen, "renormalised_output_norm")
    assert stats["renormalised_output_norm"].tolist() == pytest.approx([0.75 * 5 + 0.75 * 10, 0.25 + 0.25 * 2, 0])
