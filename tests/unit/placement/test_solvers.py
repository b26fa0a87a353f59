"""Solvers on small and large inputs, hand-worked where possible, and what they refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moekit.errors import BadConfig, BadData, NumericFault
from moekit.placement.objective import balanced_sizes
from moekit.placement.partitions import all_partitions, count_partitions
from moekit.placement.solvers.contiguous import Contiguous
from moekit.placement.solvers.exact import Exact
from moekit.placement.solvers.greedy import Greedy
from moekit.placement.solvers.random import Random
from moekit.placement.solvers.swap import Swap
from moekit.placement.tokensets import token_sets
from tests.unit.placement.samples import blocks, counts_of, planted, same_partition, skewed_choices


def pairs(*heavy: tuple[int, int, int], experts: int) -> torch.Tensor:
    """Counts that are zero but for the pairs (i, j, count)."""
    counts = torch.zeros(experts, experts, dtype=torch.int64)
    for i, j, count in heavy:
        counts[i, j] = counts[j, i] = count
    return counts


def test_random_depends_on_its_seed() -> None:
    assert len({tuple(Random(load_weight=0).solve(torch.zeros(16, 16), 4, seed=s).groups) for s in range(5)}) > 1


def test_greedy_joins_and_repairs() -> None:
    """01 opens a group, 23 the other; 4 joins 0's group by their pair; 5 (never routed) takes the place left."""
    counts = pairs((0, 1, 10), (2, 3, 9), (0, 4, 8), (2, 4, 7), experts=6)
    assert blocks(Greedy(load_weight=0).solve(counts, 2).groups) == {frozenset({0, 1, 4}), frozenset({2, 3, 5})}


def test_greedy_places_a_pair_that_finds_no_room_together() -> None:
    """01 and 23 fill one place short of both groups of 3; the pair 45 is parted, each goes where it is close."""
    counts = pairs((0, 1, 10), (2, 3, 9), (4, 5, 8), (0, 5, 2), (3, 4, 1), experts=6)
    assert blocks(Greedy(load_weight=0).solve(counts, 2).groups) == {frozenset({0, 1, 5}), frozenset({2, 3, 4})}


def test_swap_beats_greedy_where_the_heaviest_pair_misleads() -> None:
    """The heaviest pair 12 belongs apart: 01 and 23 together keep 18, 12 with what is left only 10."""
    counts = pairs((0, 1, 9), (2, 3, 9), (1, 2, 10), experts=4)
    assert Greedy(load_weight=0).solve(counts, 2).share == pytest.approx(10 / 28)
    assert Swap(load_weight=0).solve(counts, 2).share == pytest.approx(18 / 28)
    assert Exact(load_weight=0).solve(counts, 2).share == pytest.approx(18 / 28)


def brute_force(counts: torch.Tensor, sizes: list[int], load: torch.Tensor, load_weight: float) -> float:
    """Best value over every labelling, by definition."""
    experts, devices = len(counts), len(sizes)
    total = counts.triu(1).sum().item()
    best = -float("inf")
    for groups in itertools.product(range(devices), repeat=experts):
        if [groups.count(d) for d in range(devices)] != sizes:
            continue
        kept = sum(counts[i, j].item() for i in range(experts) for j in range(i) if groups[i] == groups[j])
        loads = [sum(load[e].item() for e in range(experts) if groups[e] == d) for d in range(devices)]
        best = max(best, kept / total - load_weight * (max(loads) / (sum(loads) / devices) - 1))
    return best


@pytest.mark.parametrize("load_weight", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [[3, 3], [2, 2, 2], [4, 2], [3, 2, 1], [2, 2, 1, 1]])
def test_exact_is_exact(sizes: list[int], load_weight: float) -> None:
    chosen = skewed_choices(100, 6, 2, seed=sum(sizes) + len(sizes))
    counts = counts_of(chosen, 6)
    best = brute_force(counts, sizes, counts.diagonal(), load_weight)
    for method in ("enumerate", "milp"):
        solution = Exact(method=method, load_weight=load_weight).solve(counts, len(sizes), sizes=sizes)
        assert solution.value == pytest.approx(best, abs=1e-9)
        assert solution.proven
    assert Swap(load_weight=load_weight).solve(counts, len(sizes), sizes=sizes).value == pytest.approx(best, abs=1e-9)


def test_partitions_are_all_there_once() -> None:
    assert (count_partitions([4, 4]), count_partitions([2, 2, 2, 2])) == (35, 105)
    for sizes in ([4, 4], [2, 2, 2, 2], [3, 3, 2], [5, 1, 1]):
        found = all_partitions(sizes)
        assert len(found) == count_partitions(sizes)
        assert len({frozenset(row) for row in found.tolist()}) == len(found)
        assert (np.bitwise_or.reduce(found, axis=1) == (1 << sum(sizes)) - 1).all()
        assert all([bin(m).count("1") for m in row] == list(sizes) for row in found.tolist())


def test_milp_proves_sixteen_experts() -> None:
    counts, truth = planted(16, 4, 30, 10, seed=1)
    solution = Exact(load_weight=0, time_limit=60).solve(counts, 4)
    assert solution.proven
    assert same_partition(solution.groups, truth)


def test_milp_stops_at_its_time_limit_and_states_the_gap() -> None:
    counts = counts_of(skewed_choices(3000, 32, 2), 32)
    solution = Exact(load_weight=0, time_limit=2).solve(counts, 4)
    assert not solution.proven
    assert solution.gap is not None
    assert 0 < solution.gap < 0.5
    assert solution.value >= Swap(load_weight=0).solve(counts, 4, bound=False).value


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("inside", "outside", "most_gap"), [(20, 1, 1e-4), (20, 5, 0.005), (10, 5, 0.05)])
def test_planted_partition_of_128_experts_is_recovered(inside, outside, most_gap, seed) -> None:
    counts, truth = planted(128, 8, inside, outside, seed)
    solution = Swap(load_weight=0, time_limit=600).solve(counts, 8, seed=seed)
    assert same_partition(solution.groups, truth)
    assert solution.gap is not None
    assert solution.gap / solution.value < most_gap


def rows_by_loop(indices: torch.Tensor, groups: list[int], experts: int) -> int:
    return sum(len({groups[e] for e in token if e < experts}) for token in indices.tolist())


@pytest.mark.parametrize(("experts", "top_k", "devices"), [(8, 3, 2), (9, 4, 3), (8, 4, 4)])
def test_rows_are_minimised_exactly(experts: int, top_k: int, devices: int) -> None:
    """Enumeration by rows equals the best of all partitions, each counted token by token."""
    chosen = skewed_choices(60, experts, top_k)
    chosen[::7, -1] = experts
    counts = counts_of(chosen, experts)
    solution = Exact(load_weight=0, objective="rows").solve(counts, devices, indices_NK=chosen)
    every = all_partitions(balanced_sizes(experts, devices)).tolist()
    best = min(
        rows_by_loop(chosen, [next(d for d, m in enumerate(row) if m >> e & 1) for e in range(experts)], experts)
        for row in every
    )
    assert solution.rows == rows_by_loop(chosen, solution.groups, experts) == best
    assert solution.proven
    swap = Swap(load_weight=0).solve(counts, devices, indices_NK=chosen)
    assert swap.objective == "rows"
    assert swap.rows == best
    assert swap.bound is not None
    assert swap.bound >= solution.value


def test_rows_beat_pairs_where_they_differ() -> None:
    """Three of one token's experts together make three pairs but spare the same two rows as two pairs elsewhere do."""
    chosen = skewed_choices(4000, 32, 8, seed=3)
    counts = counts_of(chosen, 32)
    by_pairs = Swap(load_weight=0, objective="pairs").solve(counts, 4, bound=False, indices_NK=chosen)
    by_rows = Swap(load_weight=0).solve(counts, 4, bound=False, indices_NK=chosen)
    assert by_pairs.rows is None
    assert by_rows.rows == rows_by_loop(chosen, by_rows.groups, 32)
    assert by_rows.rows < rows_by_loop(chosen, by_pairs.groups, 32)


def test_two_choices_need_no_token_sets() -> None:
    chosen = skewed_choices(500, 8, 2)
    counts = counts_of(chosen, 8)
    solution = Exact(load_weight=0).solve(counts, 2, indices_NK=chosen)
    by_rows = Exact(load_weight=0, objective="rows").solve(counts, 2, indices_NK=chosen)
    assert solution.objective == "pairs"
    assert by_rows.value == pytest.approx(solution.value)
    assert by_rows.rows == 1000 - round(solution.value * 500)


def test_token_sets() -> None:
    sets = token_sets(torch.tensor([[1, 0, 4], [0, 1, 4], [4, 4, 4], [2, 2, 3], [3, 4, 4]]), 4)
    assert {(tuple(s), c) for s, c in zip(sets.set_UK.tolist(), sets.count_U.tolist(), strict=True)} == {
        ((0, 1, 4), 2),
        ((2, 3, 4), 1),
        ((3, 4, 4), 1),
    }
    assert (sets.choices, sets.tokens, sets.avoidable) == (7, 4, 3)
    assert sets.pairs_EE()[0, 1] == 2
    assert sets.load_E().tolist() == [2, 2, 1, 2]


def test_many_experts_are_packed_alike() -> None:
    """Sets too wide for one integer (300^8 > 2^63) are counted the same way."""
    wide = torch.cat([skewed_choices(50, 300, 8), skewed_choices(50, 300, 8)])
    sets = token_sets(wide, 300)
    assert len(sets.set_UK) == 50
    assert set(sets.count_U.tolist()) == {2}


@pytest.mark.parametrize(("devices", "near"), [(3, "2 and 4"), (5, "4 and 8"), (7, "4 and 8")])
def test_unequal_blocks_are_refused_on_demand(devices: int, near: str) -> None:
    with pytest.raises(BadConfig, match=f"do not divide 8 experts(.|\n)*{near}"):
        Swap(load_weight=0, equal=True).solve(torch.zeros(8, 8), devices)


@pytest.mark.parametrize("devices", [0, 9, -1])
def test_impossible_devices(devices: int) -> None:
    with pytest.raises(BadConfig, match="cannot be placed"):
        Swap(load_weight=0).solve(torch.zeros(8, 8), devices)


@pytest.mark.parametrize("sizes", [[4, 3], [8, 0], [3, 3, 2], [9, -1]])
def test_impossible_sizes(sizes: list[int]) -> None:
    with pytest.raises(BadConfig, match="block sizes"):
        Swap(load_weight=0).solve(torch.zeros(8, 8), 2, sizes=sizes)


def test_damaged_counts() -> None:
    good = torch.ones(4, 4)
    nan, infinite, crooked, negative = good.clone(), good.clone(), good.clone(), good.clone()
    nan[1, 2] = nan[2, 1] = float("nan")
    infinite[0, 3] = infinite[3, 0] = float("inf")
    crooked[0, 1] = 5
    negative[2, 3] = negative[3, 2] = -1
    with pytest.raises(NumericFault, match="expert 1"):
        Swap(load_weight=0).solve(nan, 2)
    with pytest.raises(NumericFault, match="expert 0"):
        Swap(load_weight=0).solve(infinite, 2)
    with pytest.raises(BadData, match="symmetric"):
        Swap(load_weight=0).solve(crooked, 2)
    with pytest.raises(BadData, match="negative"):
        Swap(load_weight=0).solve(negative, 2)
    with pytest.raises(BadData, match="square"):
        Swap(load_weight=0).solve(torch.ones(4, 3), 2)
    with pytest.raises(BadData, match="load has shape"):
        Swap(load_weight=0).solve(good, 2, load_E=torch.ones(3))
    with pytest.raises(NumericFault, match="load"):
        Swap(load_weight=0).solve(good, 2, load_E=torch.tensor([1.0, 2.0, float("nan"), 1.0]))


def test_diagonal_of_minus_one_is_no_load() -> None:
    """Profiles that mark the diagonal with -1: load then comes from the row sums."""
    counts = counts_of(skewed_choices(100, 6, 2), 6)
    marked = counts.clone().fill_diagonal_(-1)
    assert Contiguous(load_weight=0).solve(marked, 2).imbalance == pytest.approx(
        Contiguous(load_weight=0).solve(counts, 2).imbalance
    )


def test_too_much_to_enumerate() -> None:
    with pytest.raises(BadConfig, match="too many to list"):
        Exact(load_weight=0, method="enumerate").solve(torch.zeros(16, 16), 4)
    with pytest.raises(BadConfig, match="cannot be enumerated"):
        Exact(load_weight=0, objective="rows").solve(torch.zeros(20, 20), 4, indices_NK=skewed_choices(50, 20, 4))
    with pytest.raises(BadConfig, match="needs the tokens"):
        Swap(load_weight=0, objective="rows").solve(torch.zeros(8, 8), 4)


def test_choices_of_another_model() -> None:
    with pytest.raises(BadData, match=r"expert index 9 is outside 0\.\.8"):
        Swap(load_weight=0).solve(torch.zeros(8, 8), 2, indices_NK=torch.full((3, 3), 9))
