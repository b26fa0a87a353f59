"""What every placement solver promises, with and without the load term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import catalogue
from moekit.catalogue import Trait
from moekit.placement.solver import Solver
from tests.unit.placement.samples import counts_of, skewed_choices


def of(*having: Trait, without: tuple[Trait, ...] = ()) -> list[Any]:
    """Examples of all registered solvers with some traits, and without others."""
    return [
        pytest.param(solver, id=f"{record.name}-{number}")
        for record in catalogue.methods("place")
        if record.traits.issuperset(having) and not record.traits & set(without)
        for number, solver in enumerate(record.cls.examples())
    ]


def share_kept(counts_EE: Tensor, groups: list[int]) -> float:
    """Co-activated pairs on one device by all co-activated pairs, pair by pair."""
    experts = len(groups)
    pairs = [(int(counts_EE[i, j]), groups[i] == groups[j]) for i in range(experts) for j in range(i)]
    total = sum(count for count, _ in pairs)
    return sum(count for count, together in pairs if together) / total if total else 1.0


def imbalance(counts_EE: Tensor, groups: list[int], devices: int) -> float:
    """Load of the fullest device over the mean."""
    loads = [sum(int(counts_EE[e, e]) for e, d in enumerate(groups) if d == device) for device in range(devices)]
    return max(loads) * devices / sum(loads) if sum(loads) else 1.0


@pytest.mark.parametrize("solver", of())
@pytest.mark.parametrize(("experts", "devices"), [(8, 2), (8, 3), (7, 4), (5, 5), (6, 1)])
def test_every_block_is_filled_and_the_value_is_what_is_said(solver: Solver, experts: int, devices: int) -> None:
    counts = counts_of(skewed_choices(200, experts, 2), experts)
    before = counts.clone()
    solution = solver.solve(counts, devices)
    assert torch.equal(counts, before)
    sizes = sorted(solution.groups.count(device) for device in range(devices))
    assert sizes == sorted(experts // devices + (device < experts % devices) for device in range(devices))
    share, uneven = share_kept(counts, solution.groups), imbalance(counts, solution.groups, devices)
    assert solution.share == pytest.approx(share)
    assert solution.imbalance == pytest.approx(uneven)
    assert solution.value == pytest.approx(share - solver.load_weight * (uneven - 1))
    assert solution.bound is not None
    assert solution.bound >= solution.value


@pytest.mark.parametrize("solver", of())
def test_given_sizes_are_kept(solver: Solver) -> None:
    counts = counts_of(skewed_choices(200, 8, 2), 8)
    solution = solver.solve(counts, 3, sizes=[1, 5, 2])
    assert [solution.groups.count(device) for device in range(3)] == [1, 5, 2]


@pytest.mark.parametrize("solver", of())
def test_nothing_co_activated(solver: Solver) -> None:
    """All rows zero: it ends, keeps everything there is to keep, and says so."""
    solution = solver.solve(torch.zeros(6, 6), 3)
    assert [solution.groups.count(device) for device in range(3)] == [2, 2, 2]
    assert solution.value == solution.bound == 1.0
    assert solution.imbalance == 1.0


@pytest.mark.parametrize("solver", of("stochastic"))
def test_equal_seeds_give_equal_placements_and_some_others_do_not(solver: Solver) -> None:
    counts = torch.zeros(16, 16)
    found = [solver.solve(counts, 4, seed=seed, bound=False).groups for seed in (5, 5, 6, 7, 8)]
    assert found[0] == found[1]
    assert any(groups != found[0] for groups in found[2:])


@pytest.mark.parametrize("solver", of(without=("stochastic",)))
def test_the_seed_changes_nothing(solver: Solver) -> None:
    counts = counts_of(skewed_choices(300, 12, 2), 12)
    found = [solver.solve(counts, 3, seed=seed, bound=False).groups for seed in (5, 6, 7)]
    assert found[0] == found[1] == found[2]
