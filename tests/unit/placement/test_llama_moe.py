"""Published numbers of placement on the real co-activation counts of LLaMA-MoE-3.5B."""

from __future__ import annotations

import pytest
import torch

from moekit.placement.objective import intra_pairs, pair_weights
from moekit.placement.planning import place
from moekit.placement.solvers.contiguous import Contiguous
from moekit.placement.solvers.exact import Exact
from moekit.placement.solvers.greedy import Greedy
from moekit.placement.solvers.random import Random
from moekit.placement.solvers.swap import Swap
from tests.unit.placement.samples import blocks, llama_moe

PAIRS = 204_800
COUNTS = llama_moe()

# layer, devices, optimum, contiguous, best groups (None where only the count is known)
OPTIMA = [
    (0, 2, 194_310, 137_174, [{0, 1, 3, 6}, {2, 4, 5, 7}]),
    (0, 4, 110_549, 13_489, [{0, 1}, {2, 4}, {3, 6}, {5, 7}]),
    (16, 2, 158_690, 111_859, [{0, 1, 3, 7}, {2, 4, 5, 6}]),
    (16, 4, 103_521, 13_640, [{0, 7}, {1, 3}, {2, 6}, {4, 5}]),
    (31, 2, 142_403, 109_668, None),
    (31, 4, 89_546, 54_670, None),
]


def kept(layer: int, groups: list[int]) -> int:
    return round(intra_pairs(pair_weights(COUNTS[layer]), groups))


@pytest.mark.parametrize(
    "solver",
    [Exact(load_weight=0), Exact(load_weight=0, method="milp"), Swap(load_weight=0)],
    ids=["exact", "milp", "swap"],
)
@pytest.mark.parametrize(("layer", "devices", "best", "contiguous", "groups"), OPTIMA)
def test_listed_optima(solver, layer, devices, best, contiguous, groups) -> None:
    solution = solver.solve(COUNTS[layer], devices)
    assert kept(layer, solution.groups) == best
    assert solution.value == pytest.approx(best / PAIRS, abs=1e-12)
    if groups is not None:
        assert blocks(solution.groups) == {frozenset(g) for g in groups}
    if isinstance(solver, Exact):
        assert solution.proven
        assert solution.bound == solution.value
    assert solution.bound is not None
    assert solution.bound >= best / PAIRS
    assert kept(layer, Contiguous(load_weight=0).solve(COUNTS[layer], devices).groups) == contiguous


def test_layer_0_by_hand() -> None:
    upper = [
        [2256, 0, 15105, 0, 122, 825, 149],
        [23, 41798, 360, 147, 8537, 7207],
        [1, 1379, 9, 19, 63],
        [19, 8, 47436, 1346],
        [11212, 1030, 6212],
        [39, 59478],
        [20],
    ]
    for i, row in enumerate(upper):
        assert COUNTS[0, i, i + 1 :].tolist() == row
    assert sum(map(sum, upper)) == PAIRS
    # {0,1,3,6}: 01 03 06 13 16 36; {2,4,5,7}: 24 25 27 45 47 57
    assert 2256 + 15105 + 825 + 41798 + 8537 + 47436 + 1379 + 9 + 63 + 11212 + 6212 + 59478 == 194_310


@pytest.mark.parametrize(
    ("devices", "mean", "contiguous", "load", "contiguous_load"),
    [(2, 0.7316, 0.4155, 1.04, 1.04), (4, 0.4779, 0.1299, 1.11, 1.12)],
)
def test_swap_search_reaches_all_optima(devices, mean, contiguous, load, contiguous_load) -> None:
    exact = [Exact(load_weight=0).solve(c, devices) for c in COUNTS]
    swap = [Swap(load_weight=0).solve(c, devices, bound=False) for c in COUNTS]
    blocks_in_order = [Contiguous(load_weight=0).solve(c, devices, bound=False) for c in COUNTS]
    assert [kept(n, s.groups) for n, s in enumerate(swap)] == [kept(n, s.groups) for n, s in enumerate(exact)]
    assert sum(s.value for s in exact) / 32 == pytest.approx(mean, abs=5e-5)
    assert sum(s.value for s in blocks_in_order) / 32 == pytest.approx(contiguous, abs=5e-5)
    # Row sums of the counts are the loads, since every token has exactly one partner.
    assert sum(s.imbalance for s in exact) / 32 == pytest.approx(load, abs=5e-3)
    assert sum(s.imbalance for s in blocks_in_order) / 32 == pytest.approx(contiguous_load, abs=5e-3)


def test_one_start_is_not_enough() -> None:
    """From the contiguous blocks alone, descent misses optima at D = 2: several starts earn their time."""
    found = [Swap(load_weight=0, starts=0, perturbations=0).solve(c, 2, bound=False).value for c in COUNTS]
    best = [Exact(load_weight=0).solve(c, 2).value for c in COUNTS]
    assert sum(f < b - 1e-9 for f, b in zip(found, best, strict=True)) >= 1


def test_one_placement_for_all_layers_is_nearly_useless() -> None:
    counts = dict(enumerate(COUNTS))
    for devices, shared in [(2, 0.478), (4, 0.186)]:
        placement = place(counts, devices, solver="exact", per_layer=False, config={"load_weight": 0})
        assert len({tuple(groups) for groups in placement.layers.values()}) == 1
        assert sorted(placement.layers) == list(range(32))
        mean = sum(kept(n, placement.layers[n]) for n in range(32)) / 32 / PAIRS
        assert mean == pytest.approx(shared, abs=5e-4)


def test_random_placement_keeps_what_chance_gives() -> None:
    for devices, chance in [(2, 3 / 7), (4, 1 / 7)]:
        values = [Random(load_weight=0).solve(c, devices, seed=s, bound=False).value for c in COUNTS for s in range(20)]
        assert sum(values) / len(values) == pytest.approx(chance, abs=0.02)


def test_greedy_fills_every_group() -> None:
    for devices in (2, 4):
        for counts in COUNTS:
            solution = Greedy().solve(counts, devices, bound=False)
            assert sorted(map(len, blocks(solution.groups))) == [8 // devices] * devices


def test_load_term_trades_pairs_for_balance() -> None:
    """Layer 0 at D = 4 keeps most pairs at 1.6 x mean load; a load term finds a flatter placement, still optimal."""
    free = Exact(load_weight=0).solve(COUNTS[0], 4)
    tied = Exact(load_weight=1.0).solve(COUNTS[0], 4)
    assert free.imbalance > 1.5
    assert tied.imbalance < free.imbalance
    assert tied.share < free.share
    assert tied.value == pytest.approx(tied.share - (tied.imbalance - 1), abs=1e-12)
    assert tied.value > free.share - (free.imbalance - 1)
    assert Swap(load_weight=1.0).solve(COUNTS[0], 4).value == pytest.approx(tied.value, abs=1e-9)
    assert Exact(load_weight=1.0, method="milp").solve(COUNTS[0], 4).value == pytest.approx(tied.value, abs=1e-9)


def test_counts_are_left_as_they_are() -> None:
    before = COUNTS.clone()
    for solver in (Contiguous(), Random(), Greedy(), Swap(), Exact(), Exact(method="milp")):
        solver.solve(COUNTS[3], 4)
        assert torch.equal(COUNTS, before)
