"""NAEE's search against losses worked by hand and slow searches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moekit import catalogue
from moekit.anatomy import Geometry
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.prune.naee import NAEE, best_subset, greedy_subset, rises
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, NumericFault
from moekit.trace.statistics import LayerStatistics

LOGITS_NE = torch.tensor([[2.0, 1, 0, -1], [2, 1, 0, -1], [1, 2, -1, 0], [0, -1, 2, 1]], dtype=torch.float64)
OUTPUTS_EH = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
LOSSES = {
    (0, 2): 0.491343,
    (1, 2): 0.817730,
    (0, 1): 1.080154,
    (0, 3): 1.328784,
    (1, 3): 1.343421,
    (2, 3): 1.924455,
}


class Block:
    """A layer of constant experts: top-2 of a softmax, renormalised."""

    def __init__(self, logits_NE: Tensor = LOGITS_NE, outputs_EH: Tensor = OUTPUTS_EH, top_k: int = 2) -> None:
        self.logits_NE, self.outputs_EH, self.top_k = logits_NE, outputs_EH, top_k
        self.asked: list[tuple[int, ...]] = []

    def output(self, kept: Sequence[int]) -> Tensor:
        masked_NE = torch.full_like(self.logits_NE, float("-inf"))
        masked_NE[:, list(kept)] = self.logits_NE[:, list(kept)]
        weights_NK, indices_NK = masked_NE.softmax(-1).topk(self.top_k)
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        return (weights_NK[..., None] * self.outputs_EH[indices_NK]).sum(1)

    def loss(self, kept: Sequence[int]) -> float:
        self.asked.append(tuple(kept))
        everyone = range(self.logits_NE.shape[1])
        return float(torch.linalg.matrix_norm(self.output(everyone) - self.output(kept)))


def random_block(seed: int, experts: int = 6) -> Block:
    g = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(20, experts, generator=g, dtype=torch.float64)
    return Block(logits_NE, torch.randn(experts, 3, generator=g, dtype=torch.float64))


def inputs(experts: int = 4, protected: frozenset[int] = frozenset(), weights: LayerWeights | None = None):
    geometry = Geometry(2, experts, 2, 3, 0, True, False, False, True)
    read = None if weights is None else lambda: weights
    return LayerInputs(7, geometry, LayerStatistics(experts, 2), read, protected=protected)


def test_losses_of_every_pair() -> None:
    block = Block()
    for kept, loss in LOSSES.items():
        assert block.loss(kept) == pytest.approx(loss, abs=1e-6)
    outcome = NAEE(strategy="exhaustive").search(inputs(), block, 2)
    assert outcome.keep == (0, 2)
    assert outcome.figures["loss"] == pytest.approx(0.491343, abs=1e-6)
    # Frequency (3, 3, 1, 1) would have kept 0 and 1.
    assert torch.bincount(LOGITS_NE.topk(2).indices.flatten()).tolist() == [3, 3, 1, 1]


@pytest.mark.parametrize("strategy", ["auto", "exhaustive", "greedy"])
def test_keeping_all_has_loss_0(strategy: str) -> None:
    outcome = NAEE(strategy=strategy).search(inputs(), Block(), 4)  # type: ignore[arg-type]
    assert outcome.keep == (0, 1, 2, 3)
    assert outcome.figures["loss"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_one_less_is_one_by_one(seed: int) -> None:
    block = random_block(seed)
    everyone = set(range(6))
    losses = [block.loss(sorted(everyone - {e})) for e in range(6)]
    expected = tuple(sorted(everyone - {losses.index(min(losses))}))
    for strategy in ("exhaustive", "greedy"):
        outcome = NAEE(strategy=strategy).search(inputs(6), block, 5)  # type: ignore[arg-type]
        assert outcome.keep == expected
        assert outcome.figures["rise"] == pytest.approx(losses)  # the loss of all is 0
        assert outcome.figures["loss"] == pytest.approx(min(losses))


@pytest.mark.parametrize("keep", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_searches_against_slow_ones(seed: int, keep: int) -> None:
    block = random_block(seed)
    best = min(itertools.combinations(range(6), keep), key=block.loss)
    left = list(range(6))
    while len(left) > keep:
        losses = {e: block.loss([k for k in left if k != e]) for e in left}
        left.remove(min(losses, key=lambda e: losses[e]))
    assert best_subset(block.loss, 6, keep) == best
    assert greedy_subset(block.loss, 6, keep) == tuple(left)
    assert block.loss(best) <= block.loss(left)


def test_greedy_is_not_always_best() -> None:
    assert any(
        best_subset(b.loss, 6, 2) != greedy_subset(b.loss, 6, 2) for b in (random_block(seed) for seed in range(8))
    )


def test_of_equal_losses_lower_numbers_stay() -> None:
    def nothing(kept: Sequence[int]) -> float:
        return 0.0

    assert best_subset(nothing, 5, 3) == (0, 1, 2)
    assert greedy_subset(nothing, 5, 3) == (0, 1, 2)
    assert best_subset(nothing, 5, 3, fixed={4, 2}) == (0, 2, 4)
    assert greedy_subset(nothing, 5, 3, fixed={4, 2}) == (0, 2, 4)


def test_an_expert_that_no_token_would_choose_goes_first() -> None:
    logits_NE = LOGITS_NE.clone()
    logits_NE[:, 0] = -50
    for strategy in ("exhaustive", "greedy"):
        outcome = NAEE(strategy=strategy).search(inputs(), Block(logits_NE), 3)  # type: ignore[arg-type]
        assert outcome.keep == (1, 2, 3)
        assert outcome.figures["rise"][0] == 0  # type: ignore[index]


@pytest.mark.parametrize("strategy", ["exhaustive", "greedy"])
def test_protected_experts_stay(strategy: str) -> None:
    method = NAEE(strategy=strategy)  # type: ignore[arg-type]
    assert 3 in method.search(inputs(protected=frozenset({3})), Block(), 2).keep
    best = NAEE(strategy="exhaustive").search(inputs(protected=frozenset({3})), Block(), 2)
    assert best.keep == (0, 3)  # 1.328784, the best of those with 3
    with pytest.raises(BadConfig, match="3 experts are protected") as caught:
        method.search(inputs(protected=frozenset({0, 1, 3})), Block(), 2)
    assert caught.value.layer == 7


def test_auto_is_exhaustive_up_to_a_bound_and_asks_each_subset_once() -> None:
    few, many = Block(), Block()
    NAEE(most_subsets=6).search(inputs(), few, 2)
    NAEE(most_subsets=5).search(inputs(), many, 2)
    assert set(LOSSES) <= set(few.asked)
    # All, four without one, then the pairs within the best three.
    assert len(many.asked) == 1 + 4 + 3
    for block in (few, many):
        assert len(set(block.asked)) == len(block.asked)
    assert NAEE(most_subsets=6).search(inputs(), Block(), 2).figures["evaluations"] == 1 + 4 + 6


def test_an_endless_search_is_refused_before_it_starts() -> None:
    block = random_block(0, experts=32)
    with pytest.raises(BadConfig, match=r"6e\+08 times") as caught:  # C(32, 16) = 601080390
        NAEE(strategy="exhaustive").search(inputs(32), block, 16)
    assert caught.value.layer == 7
    assert not block.asked


def test_rises_are_measured_from_what_all_experts_give() -> None:
    # Behind pruned layers even the full block is off its target.
    assert rises(lambda kept: 5.0 - len(kept), 3) == [1.0, 1.0, 1.0]
    assert rises(lambda kept: 9.0, 1) == [0.0]


def test_only_progressive_mode_is_sequential() -> None:
    assert NAEE.searches
    assert not NAEE().sequential
    assert NAEE(mode="progressive").sequential
    assert catalogue.of(NAEE).needs == ()


def test_scores_need_the_search() -> None:
    with pytest.raises(BadConfig, match="search") as caught:
        NAEE().score(inputs())
    assert caught.value.layer == 7


def test_a_loss_that_is_no_number_names_layer_and_expert() -> None:
    outputs_EH = OUTPUTS_EH.clone()
    outputs_EH[1] = float("nan")
    with pytest.raises(NumericFault) as caught:
        NAEE().search(inputs(), Block(outputs_EH=outputs_EH), 2)
    assert (caught.value.layer, caught.value.expert) == (7, None)
    up = torch.ones(4, 3, 2)
    up[1, 2, 0] = float("nan")
    weights = LayerWeights(up, torch.ones(4, 2, 3))
    with pytest.raises(NumericFault) as caught:
        NAEE().search(inputs(weights=weights), Block(outputs_EH=outputs_EH), 2)
    assert (caught.value.layer, caught.value.expert) == (7, 1)
