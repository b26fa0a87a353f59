"""Laws of the swap search and of the bounds, on random inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.placement.bounds import least_imbalance, partner_bound, spectral_bound, upper_bound
from moekit.placement.local import PairState, RowState, balanced_blocks, imbalance_after_EE
from moekit.placement.objective import Problem, intra_pairs, max_over_mean, relabel
from moekit.placement.partitions import best_partition
from moekit.placement.solvers.swap import Swap
from moekit.placement.tokensets import token_sets

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def random_counts(rng: np.random.Generator, experts: int) -> np.ndarray:
    upper = np.triu(rng.integers(0, 20, (experts, experts)) * (rng.random((experts, experts)) < 0.7), 1)
    return (upper + upper.T).astype(np.float64)


def random_groups(rng: np.random.Generator, sizes: list[int]) -> np.ndarray:
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES)
def test_pair_gains_are_the_difference_a_swap_makes(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    experts = sum(sizes)
    weight = random_counts(rng, experts)
    total = weight.sum() / 2 or 1.0
    state = PairState(weight, random_groups(rng, sizes), len(sizes), total)
    for _ in range(4):
        gains = state.gains_EE()
        for i in range(experts):
            for j in range(experts):
                if state.group_E[i] == state.group_E[j]:
                    continue
                swapped = state.group_E.copy()
                swapped[[i, j]] = swapped[[j, i]]
                change = (intra_pairs(weight, swapped) - intra_pairs(weight, state.group_E)) / total
                assert abs(gains[i, j] - change) < 1e-9
        state.swap(*rng.integers(0, experts, 2).tolist())


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES, st.integers(1, 5))
def test_row_gains_are_the_difference_a_swap_makes(seed: int, sizes: list[int], top_k: int) -> None:
    rng = np.random.default_rng(seed)
    experts, devices = sum(sizes), len(sizes)
    sets = token_sets(torch.from_numpy(rng.integers(0, experts + 1, (rng.integers(1, 30), top_k))), experts)
    state = RowState(sets, random_groups(rng, sizes), devices)
    scale = sets.avoidable or 1
    for _ in range(3):
        gains = state.gains_EE()
        for i in range(experts):
            for j in range(experts):
                if state.group_E[i] == state.group_E[j] or not sets.avoidable:
                    continue
                swapped = state.group_E.copy()
                swapped[[i, j]] = swapped[[j, i]]
                spared = sets.rows(state.group_E, devices) - sets.rows(swapped, devices)
                assert abs(gains[i, j] - spared / scale) < 1e-9
        state.swap(*rng.integers(0, experts, 2).tolist())


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES)
def test_load_after_a_swap(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    experts, devices = sum(sizes), len(sizes)
    load, groups = rng.integers(0, 9, experts).astype(np.float64), random_groups(rng, sizes)
    after = imbalance_after_EE(load, groups, devices)
    for i in range(experts):
        for j in range(experts):
            if groups[i] != groups[j]:
                swapped = groups.copy()
                swapped[[i, j]] = swapped[[j, i]]
                expected = max_over_mean(np.bincount(swapped, weights=load, minlength=devices))
                assert abs(after[i, j] - expected) < 1e-9


@settings(deadline=None, max_examples=80)
@given(SEEDS, SIZES, st.sampled_from([0.0, 0.2, 1.0]), st.booleans())
def test_bounds_are_above_the_optimum_and_search_below(
    seed: int, sizes: list[int], load_weight: float, by_rows: bool
) -> None:
    rng = np.random.default_rng(seed)
    experts = sum(sizes)
    chosen = torch.from_numpy(rng.integers(0, experts + 1, (20, 3)))
    sets = token_sets(chosen, experts)
    load = rng.integers(0, 9, experts).astype(np.float64)
    weight = sets.pairs_EE() if by_rows else random_counts(rng, experts)
    problem = Problem(weight, tuple(sizes), load, load_weight, sets if by_rows else None, seed)
    best = problem.value(best_partition(problem))
    found, _, _ = Swap(load_weight=load_weight).search(problem)
    assert problem.value(found) <= best + 1e-9
    for target in (0.0, problem.share(found)):
        assert upper_bound(problem, target=target, steps=40) >= best - 1e-9
    assert upper_bound(problem, steps=0) >= best - 1e-9


@pytest.mark.full
@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES)
def test_no_balance_is_better_than_its_bound_and_search_is_worth_the_balanced_blocks(
    seed: int, sizes: list[int]
) -> None:
    """Balanced blocks are what balancing by load alone (EPLB without copies) gives."""
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 30, sum(sizes)).astype(np.float64)
    # Without pairs the objective is balance alone: the optimum is found by listing all partitions.
    alone = Problem(np.zeros((sum(sizes), sum(sizes))), tuple(sizes), load, 1.0, None, seed)
    best = alone.imbalance(best_partition(alone))
    assert least_imbalance(load, sizes) <= best + 1e-9
    problem = Problem(random_counts(rng, sum(sizes)), tuple(sizes), load, 1.0, None, seed)
    by_load = balanced_blocks(load, sizes)
    assert np.bincount(by_load, minlength=len(sizes)).tolist() == list(sizes)
    assert problem.value(Swap().search(problem)[0]) >= problem.value(by_load) - 1e-9


def test_bounds_on_balance_by_hand() -> None:
    """8, 1, 1, 1 on two devices: whoever holds 8 holds at least 1 more, so 9 of a mean of 5.5. 3, 3, 3, 1, 1, 1: two
    of the three heaviest lie together, with at least 1."""
    assert least_imbalance(np.array([8.0, 1, 1, 1]), [2, 2]) == pytest.approx(9 / 5.5)
    assert least_imbalance(np.array([3.0, 3, 3, 1, 1, 1]), [3, 3]) == pytest.approx(7 / 6)
    assert least_imbalance(np.zeros(4), [2, 2]) == 1.0


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES)
def test_each_bound_on_pairs_alone(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    weight = random_counts(rng, sum(sizes))
    best = max(intra_pairs(weight, random_groups(rng, sizes)) for _ in range(50))
    assert partner_bound(weight, sizes) >= best - 1e-9
    assert spectral_bound(weight, sizes, target=best, steps=30) >= best - 1e-6


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES)
def test_relabelling_keeps_the_partition(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    groups = random_groups(rng, sizes)
    renamed = relabel(groups, sizes)
    assert len(set(zip(groups.tolist(), renamed, strict=True))) == len(sizes)
    assert [renamed.count(d) for d in range(len(sizes))] == sizes
    shuffled = {s: rng.permutation([d for d, size in enumerate(sizes) if size == s]).tolist() for s in set(sizes)}
    mapping = {d: shuffled[s].pop() for d, s in enumerate(sizes)}
    assert relabel([mapping[int(d)] for d in groups], sizes) == renamed
