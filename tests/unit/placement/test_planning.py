"""Placing a whole model: automatic solver, nodes first, routing groups kept whole, comparison, paired intervals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.placement.comparison import compare, compare_solvers
from moekit.placement.paired import constraint_gain, paired_rows, trace_rows_per_document
from moekit.placement.plan import Placement
from moekit.placement.planning import make_solver, place
from moekit.placement.simulation import place_trace, simulate
from moekit.placement.solvers.exact import Exact
from moekit.placement.solvers.swap import Swap
from moekit.placement.topology import node_of_devices
from tests.unit.placement.samples import counts_of, planted, same_partition, skewed_choices, trace_of


def a_trace(experts: int = 8, top_k: int = 2, tokens: int = 600, layers: int = 2, **more: Any):
    choices = {n: skewed_choices(tokens, experts, top_k, seed=n) for n in range(layers)}
    return trace_of(choices, experts, **more)


def test_every_layer_gets_its_own_optimum() -> None:
    trace = a_trace()
    placement = place_trace(trace, 2, config={"load_weight": 0})
    assert placement.solver == "auto"
    assert placement.proven == [0, 1]
    assert placement.fingerprint == "model-a"
    assert placement.trace == trace.digest
    for layer in (0, 1):
        best = Exact(load_weight=0).solve(counts_of(trace.indices(layer), 8), 2)
        assert placement.objective[layer] == pytest.approx(best.value)
        # K = 2: rows per token are 2 - f, exactly.
        result = simulate(trace, placement).layers[layer]
        assert result.rows_once_per_device == 1200 - round(best.value * 600)
    shared = place_trace(trace, 2, per_layer=False, config={"load_weight": 0})
    assert shared.layers[0] == shared.layers[1]
    assert simulate(trace, placement).total.rows_once_per_device < simulate(trace, shared).total.rows_once_per_device


def test_automatic_choice_of_solver() -> None:
    many, truth = planted(24, 3, 20, 2, seed=0)
    placement = place({0: many}, 3)
    assert same_partition(placement.layers[0], truth)
    uneven = place({0: many[:10, :10]}, 3)
    assert uneven.sizes(0) == [4, 3, 3]
    assert uneven.proven == [0]


def test_more_choices_than_two_optimise_rows() -> None:
    trace = a_trace(experts=24, top_k=6, tokens=1500)
    config = {"load_weight": 0}
    by_rows = simulate(trace, place_trace(trace, 4, solver="swap", config=config)).total.rows_once_per_device
    by_pairs = simulate(trace, place_trace(trace, 4, solver="swap", config={**config, "objective": "pairs"})).total
    assert by_rows < by_pairs.rows_once_per_device


def test_nodes_come_first() -> None:
    """Heavy pairs 01 23 45 67, light links between neighbours of them: nodes cut the lightest links."""
    counts = torch.zeros(8, 8, dtype=torch.int64)
    for i, j, count in [(0, 1, 50), (2, 3, 50), (4, 5, 50), (6, 7, 50), (1, 6, 20), (2, 5, 20), (0, 3, 5)]:
        counts[i, j] = counts[j, i] = count
    placement = place({0: counts}, 4, nodes=2, solver="exact")
    groups, node_of = placement.layers[0], node_of_devices(4, 2)
    by_node = [{e for e in range(8) if node_of[groups[e]] == n} for n in range(2)]
    assert sorted(map(sorted, by_node)) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert all(groups[e] == groups[e + 1] for e in (0, 2, 4, 6))
    assert placement.nodes == 2


def test_nodes_first_sends_fewer_rows_across() -> None:
    trace = a_trace(experts=16, top_k=4, tokens=2000)
    flat = place_trace(trace, 8, solver="swap").model_copy(update={"nodes": 2})
    nested = place_trace(trace, 8, solver="swap", nodes=2)
    across_flat = simulate(trace, flat).total.across_per_node
    across_nested = simulate(trace, nested).total.across_per_node
    assert across_nested is not None
    assert across_flat is not None
    assert across_nested <= across_flat


@pytest.mark.parametrize(("devices", "nodes"), [(2, 1), (4, 1), (8, 1), (4, 2), (8, 2), (8, 4), (16, 2)])
@pytest.mark.parametrize("top_k", [2, 4])
def test_routing_groups_stay_whole(devices: int, nodes: int, top_k: int) -> None:
    """16 experts in 4 groups: a device holds whole groups, or a group has devices of its own."""
    trace = a_trace(experts=16, top_k=top_k, tokens=400, layers=1)
    placement = place_trace(trace, devices, solver="swap", nodes=nodes, routing_groups=4)
    order = placement.order(0)
    for start in range(0, 16, 4):
        assert len({e // 4 for e in order[start : start + 4]}) == 1
    assert placement.sizes(0) == [16 // devices] * devices
    assert placement.bound is not None
    assert placement.bound[0] >= placement.objective[0]


@pytest.mark.parametrize(("devices", "near"), [(3, "2 and 4"), (6, "4 and 8"), (13, "12 and 16")])
def test_routing_groups_refuse_other_devices(devices: int, near: str) -> None:
    with pytest.raises(BadConfig, match=f"routing groups(.|\n)*{near}"):
        place({0: torch.zeros(16, 16)}, devices, routing_groups=4)


def test_a_routing_group_on_devices_of_its_own_may_be_uneven() -> None:
    placement = place({0: counts_of(skewed_choices(300, 16, 2), 16)}, 12, solver="swap", routing_groups=4)
    assert placement.sizes(0) == [2, 1, 1] * 4
    assert all(device // 3 == expert // 4 for expert, device in enumerate(placement.layers[0]))


def test_routing_groups_refuse_uneven_nodes() -> None:
    with pytest.raises(BadConfig, match="nodes of different size"):
        place({0: torch.zeros(16, 16)}, 4, nodes=3, routing_groups=4)


def test_routing_groups_refuse_sizes_and_other_experts() -> None:
    with pytest.raises(BadConfig, match="block sizes"):
        place({0: torch.zeros(8, 8)}, 2, routing_groups=2, sizes=[4, 4])
    with pytest.raises(BadConfig, match="do not divide"):
        place({0: torch.zeros(9, 9)}, 2, routing_groups=2)


def test_refusals() -> None:
    with pytest.raises(BadConfig, match="no layer"):
        place({}, 2)
    with pytest.raises(BadConfig, match="did you mean 'swap'"):
        place({0: torch.zeros(4, 4)}, 2, solver="swop")
    with pytest.raises(BadConfig, match="perturbations"):
        make_solver("swap", {"perturbations": -1})
    with pytest.raises(BadConfig, match="share a placement"):
        place({0: torch.zeros(4, 4), 1: torch.zeros(6, 6)}, 2, per_layer=False)
    with pytest.raises(BadConfig, match="do not divide"):
        place({0: torch.zeros(8, 8)}, 3, config={"equal": True})


def test_layers_of_different_size() -> None:
    placement = place({0: torch.zeros(4, 4), 1: torch.zeros(6, 6)}, 2)
    assert placement.experts == 6
    assert (placement.sizes(0), placement.sizes(1)) == ([2, 2], [3, 3])


def test_solver_objects_are_named() -> None:
    placement = place({0: torch.zeros(4, 4)}, 2, solver=Swap(perturbations=1))
    assert placement.solver == "swap"
    assert placement.config["perturbations"] == 1


def test_a_trace_of_another_model() -> None:
    trace = a_trace()
    placement = place_trace(trace, 2)
    with pytest.raises(BadConfig, match="made for model"):
        simulate(a_trace(fingerprint="model-b"), placement)
    with pytest.raises(BadConfig, match="experts here") as caught:
        simulate(a_trace(experts=6, fingerprint=""), placement)
    assert caught.value.layer == 0
    with pytest.raises(BadConfig, match="no such layer"):
        simulate(a_trace(layers=3), placement)


def test_simulation_adds_layers_up() -> None:
    trace = a_trace(experts=12, top_k=3, layers=3)
    run = simulate(trace, place_trace(trace, 4, nodes=2))
    assert run.total.tokens == 1800
    assert run.total.rows_once_per_device == sum(r.rows_once_per_device for r in run.layers.values())
    assert run.total.remote_per_device == sum(r.remote_per_device or 0 for r in run.layers.values())
    assert run.worst_imbalance >= run.imbalance >= 1
    assert run.as_dict()["total"]["rows_once_per_expert"] == 5400


def test_comparison() -> None:
    trace = a_trace(experts=8, top_k=2, tokens=1000)
    found = compare_solvers(trace, seeds=3)
    rows = {(r.devices, r.name): r for r in found.rows}
    assert set(rows) == {(d, n) for d in (2, 4, 8) for n in ("contiguous", "random", "greedy", "swap", "exact")}
    for devices in (2, 4):
        best = rows[devices, "exact"]
        assert best.gap == 0
        assert best.proven == 2
        assert best.once_per_expert == 2
        assert best.rows_per_token == pytest.approx(2 - best.kept)
        assert best.saved == pytest.approx(1 - best.rows_per_token / 2)
        assert best.saved_over_random == pytest.approx(1 - best.rows_per_token / best.expected_random)
        drawn = rows[devices, "random"]
        assert drawn.rows_per_token == pytest.approx(drawn.expected_random, rel=0.05)
        assert all(best.rows_per_token <= rows[devices, n].rows_per_token + 1e-12 for n in ("greedy", "swap"))
        assert rows[devices, "random"].rows_std > 0
        assert rows[devices, "random"].seeds == 3
        assert best.imbalance >= 1
        assert best.remote_per_token < best.rows_per_token
    assert rows[8, "exact"].rows_per_token == 2
    assert found.table().count("\n") == 1 + len(found.rows)
    assert found.as_dicts()[0]["devices"] == 2


def test_comparison_on_text_the_placement_has_not_seen() -> None:
    choices = skewed_choices(2000, 16, 2)
    seen, unseen = trace_of({0: choices[::2]}, 16), trace_of({0: choices[1::2]}, 16)
    own = compare_solvers(unseen, [4], ["swap"]).rows[0]
    other = compare_solvers(unseen, [4], ["swap"], planned_on=seen).rows[0]
    blocks = compare_solvers(unseen, [4], ["contiguous"]).rows[0]
    assert own.rows_per_token <= other.rows_per_token < blocks.rows_per_token


def test_comparison_of_given_placements() -> None:
    trace = a_trace()
    found = compare(trace, {"mine": place_trace(trace, 4), "order": place_trace(trace, 2, solver="contiguous")})
    assert [(r.devices, r.name) for r in found.rows] == [(2, "order"), (4, "mine")]
    with pytest.raises(BadConfig, match="nothing to compare"):
        compare(trace, {})
    with pytest.raises(BadConfig, match="cannot be placed"):
        compare_solvers(trace, [9, 16])


def test_a_random_placement_is_known_without_drawing_one() -> None:
    """The mean over all 20 ways to put 6 experts on 2 devices, replayed one by one; some tokens chose fewer experts."""
    choices = torch.tensor([[0, 1, 2], [0, 3, 6], [5, 6, 6], [2, 4, 5]])  # 6: no expert
    trace = trace_of({0: choices}, 6)
    replayed = []
    for block in itertools.combinations(range(6), 3):
        devices = [0 if expert in block else 1 for expert in range(6)]
        rows = [len({devices[e] for e in token if e < 6}) for token in choices.tolist()]
        replayed.append(sum(rows) / 4)
    row = compare(trace, {"mine": place_trace(trace, 2)}).rows[0]
    assert row.expected_random == pytest.approx(sum(replayed) / 20)
    assert row.saved_over_random == pytest.approx(1 - row.rows_per_token / row.expected_random)


def test_paired_difference_by_hand() -> None:
    first, second, tokens = torch.tensor([20, 40, 0]), torch.tensor([15, 30, 0]), torch.tensor([10, 20, 0])
    found = paired_rows(first, second, tokens, resamples=200)
    assert (found.first, found.second, found.difference, found.documents) == (2.0, 1.5, 0.5, 2)
    # Both documents spare half a row a token, and a quarter of the rows: whatever is drawn, so does the sample.
    assert (found.low, found.high) == (0.5, 0.5)
    assert (found.change, found.change_low, found.change_high) == (-0.25, -0.25, -0.25)


def test_a_share_is_resampled_as_a_share() -> None:
    """Every document spares half of its rows, however many those are: the share is certain, the number is not."""
    first = torch.arange(10, 50)
    found = paired_rows(2 * first, first, torch.full((40,), 10))
    assert (found.change, found.change_low, found.change_high) == (-0.5, -0.5, -0.5)
    assert found.high - found.low > 0.5


def test_a_share_of_few_documents_has_the_interval_of_student_by_hand() -> None:
    first, second, tokens = torch.tensor([10, 20, 30]), torch.tensor([9, 14, 24]), torch.tensor([5, 10, 15])
    found = paired_rows(first, second, tokens)
    # change = -13/60; residuals t_i - change * s_i are 7/6, -5/3, 1/2; their squares add up to 79/18.
    error = (3 / 2 * 79 / 18) ** 0.5 / 60
    margin = 4.302652729911275 * error  # Student's t with two degrees of freedom
    assert found.change == pytest.approx(-13 / 60)
    assert (found.change_low, found.change_high) == pytest.approx((-13 / 60 - margin, -13 / 60 + margin))
    with pytest.raises(BadData, match="one document"):
        paired_rows(first[:1], second[:1], tokens[:1])


def test_paired_interval_covers_what_it_should() -> None:
    """40 documents whose true mean difference is 0.3: about 95 % of intervals hold it."""
    hits = 0
    g = torch.Generator().manual_seed(0)
    tokens = torch.full((40,), 100)
    for trial in range(200):
        second = torch.randint(100, 200, (40,), generator=g)
        gain = (30 + 20 * torch.randn(40, generator=g)).round().long()
        found = paired_rows(second + gain, second, tokens, resamples=400, seed=trial)
        assert found.low <= found.difference <= found.high
        hits += found.low <= 0.3 <= found.high
    assert 175 <= hits <= 199


def test_the_interval_of_a_share_covers_what_it_should() -> None:
    """40 documents of very different length, a third of whose rows is spared on average."""
    hits, g = 0, torch.Generator().manual_seed(0)
    for trial in range(200):
        first = torch.randint(50, 500, (40,), generator=g)
        second = (first * (2 / 3 + 0.1 * torch.randn(40, generator=g))).round().long()
        found = paired_rows(first, second, torch.full((40,), 100), resamples=400, seed=trial)
        hits += found.change_low <= -1 / 3 <= found.change_high
    assert 175 <= hits <= 199


def test_paired_refusals() -> None:
    rows = torch.tensor([1, 2])
    with pytest.raises(BadData, match="same documents"):
        paired_rows(rows, rows[:1], rows)
    with pytest.raises(BadData, match="no documents"):
        paired_rows(rows, rows, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BadConfig, match="confidence"):
        paired_rows(rows, rows, rows, confidence=1.5)


def test_what_a_constraint_adds_beyond_placement() -> None:
    """Experts 2..K of the constrained trace come from the first one's half: every token sends one row."""
    free = a_trace(experts=8, top_k=2, tokens=1000)
    best = place_trace(free, 2)
    held = {}
    for layer in (0, 1):
        chosen = free.indices(layer).clone()
        device = torch.tensor(best.layers[layer])
        partner = torch.tensor([next(o for o in range(8) if o != e and device[o] == device[e]) for e in range(8)])
        chosen[:, 1] = torch.where(device[chosen[:, 0]] == device[chosen[:, 1]], chosen[:, 1], partner[chosen[:, 0]])
        held[layer] = chosen
    constrained = trace_of(held, 8)
    found = constraint_gain(free, best, constrained, best)
    rows, tokens = trace_rows_per_document(free, best)
    assert found.second == 1.0
    assert found.first == pytest.approx(simulate(free, best).total.rows_per_token)
    assert found.difference == pytest.approx(int(rows.sum()) / int(tokens.sum()) - 1)
    assert 0 < found.low < found.difference < found.high
    same = constraint_gain(free, best, free, best)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_constraint_gain_needs_the_same_documents() -> None:
    free = a_trace()
    best = place_trace(free, 2)
    with pytest.raises(BadData, match="same documents"):
        constraint_gain(free, best, a_trace(documents=7), best)
    with pytest.raises(BadConfig, match="numbers of devices"):
        constraint_gain(free, best, free, place_trace(free, 4))


def test_a_placement_with_copies_is_replayed_with_them() -> None:
    trace = a_trace(experts=4, layers=1)
    single = place_trace(trace, 2)
    everywhere = {e: [1 - d] for e, d in enumerate(single.layers[0])}
    doubled = Placement(**{**single.model_dump(), "replicas": {0: everywhere}})
    assert simulate(trace, doubled).total.remote_per_device == 0
    assert simulate(trace, single).total.remote_per_device != 0
