"""Copies by load: published examples of EPLB, one worked by hand, and copies kept apart."""

from __future__ import annotations

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.placement.objective import device_load
from moekit.placement.planning import place
from moekit.placement.redundancy import add_copies, added_copies, place_by_load, shares
from moekit.placement.replicas import duplicate, pack, replicate_experts
from moekit.placement.simulation import simulate
from tests.unit.placement.samples import trace_of

# The two layers of EPLB's own example: 12 experts in 4 groups, 16 slots on 8 devices in 2 nodes.
README = ([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27])
# Tokens of 8 experts; on 4 devices in order the loads are 240, 80, 56, 24.
LOAD = [160, 80, 40, 40, 32, 24, 16, 8]


@pytest.mark.parametrize(
    ("load", "slots"),
    [
        (README[0], (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1)),
        (README[1], (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1)),
    ],
)
def test_published_example(load: list[int], slots: tuple[int, ...]) -> None:
    assert replicate_experts(load, 16, 8, nodes=2, groups=4).expert_P == slots


def test_hierarchical() -> None:
    found = replicate_experts(LOAD, 12, 4, nodes=2, groups=4)
    assert found.expert_P == (1, 0, 7, 0, 0, 6, 4, 3, 3, 5, 2, 2)
    assert found.count_E == (3, 1, 2, 2, 1, 1, 1, 1)
    assert found.load(LOAD) == pytest.approx([80 + 160 / 3 + 8, 320 / 3 + 16, 72, 64])
    assert found.max_over_mean(LOAD) == pytest.approx(1.413, abs=5e-4)
    assert [sorted(s for s in row if s >= 0) for row in found.slot_EC[:3]] == [[1, 3, 4], [0], [10, 11]]
    # Two copies of expert 0 lie on device 1, both copies of expert 2 on device 3.
    assert [sorted(held) for held in found.holders[:3]] == [[0, 1], [0], [3]]


def test_global() -> None:
    found = replicate_experts(LOAD, 12, 4)
    assert found.count_E == (4, 2, 1, 1, 1, 1, 1, 1)
    assert found.load(LOAD) == pytest.approx([112, 104, 96, 88])
    assert found.max_over_mean(LOAD) == pytest.approx(1.12)
    # Nodes that do not divide the groups are left aside.
    assert replicate_experts(LOAD, 12, 4, nodes=2, groups=1) == found


def test_without_copies() -> None:
    found = replicate_experts(LOAD, 8, 4)
    assert found.load(LOAD) == [168, 96, 72, 64]
    assert found.max_over_mean(LOAD) == pytest.approx(1.68)
    in_order = device_load(torch.tensor(LOAD).numpy(), [0, 0, 1, 1, 2, 2, 3, 3], 4)
    assert in_order.tolist() == [240, 80, 56, 24]
    assert in_order.max() / in_order.mean() == pytest.approx(2.40)


def test_copies_kept_apart() -> None:
    """Two copies each of experts 0 to 3, which share the two devices of their node."""
    found = replicate_experts(LOAD, 12, 4, nodes=2, groups=4, distinct=True)
    assert found.count_E == (2, 2, 2, 2, 1, 1, 1, 1)
    assert [sorted(held) for held in found.holders] == [[0, 1], [0, 1], [2, 3], [2, 3], [2], [3], [0], [1]]
    assert found.load(LOAD) == [80 + 40 + 16, 80 + 40 + 8, 20 + 20 + 32, 20 + 20 + 24]


def test_copies_of_the_heaviest_per_copy_ties_to_the_lowest() -> None:
    """12, 6, 6: the first gets one (6, 6, 6), then of equals the first again (4), then experts 1 and 2."""
    found = duplicate([12, 6, 6], 7)
    assert found.expert_P == [0, 1, 2, 0, 0, 1, 2]
    assert found.copy_P == [0, 0, 0, 1, 2, 1, 1]
    assert duplicate([12, 6, 6], 6, most=2).count_E == [2, 2, 2]


def test_packing() -> None:
    """5 and 4 apart, 3 to the lighter, 3 likewise, and what is left where there is room."""
    assert pack([5, 4, 3, 3, 2, 1], 2) == [[0, 3, 5], [1, 2, 4]]
    assert pack([1, 9, 5], 3) == [[0], [1], [2]]


def test_a_full_pack_makes_room() -> None:
    """10 | 4, 3, 2, a 1 of kind 0 to the first; the other 1 may not follow: it takes the 2's place, which moves."""
    assert pack([10, 4, 3, 2, 1, 1], 2, [1, 2, 3, 4, 0, 0]) == [[0, 4, 3], [1, 2, 5]]
    assert pack([10, 4, 3, 2, 1, 1], 2) == [[0, 4, 5], [1, 2, 3]]


def test_refusals() -> None:
    with pytest.raises(BadConfig, match="nearest legal numbers of slots are 8 or 12"):
        replicate_experts(LOAD, 10, 4)
    with pytest.raises(BadConfig, match="legal"):
        replicate_experts(LOAD, 4, 4)
    with pytest.raises(BadConfig, match="3 equal nodes"):
        replicate_experts(LOAD, 8, 4, nodes=3)
    with pytest.raises(BadConfig, match="3 groups"):
        replicate_experts(LOAD, 8, 4, groups=3)
    with pytest.raises(BadConfig, match="more than the 4 experts its node holds"):
        replicate_experts(LOAD, 20, 4, nodes=2, groups=2, distinct=True)
    with pytest.raises(BadData, match="expert 1"):
        replicate_experts([1, float("nan")], 2, 2)
    with pytest.raises(BadData, match="expert 0"):
        replicate_experts([-1.0, 2.0], 2, 2)
    with pytest.raises(BadConfig, match="0 to 6 redundant slots"):
        added_copies([0, 0, 1, 1, 2, 2, 3, 3], LOAD, 7, 4)


def test_added_copies_by_hand() -> None:
    """One slot each; loads are 240, 80, 56, 24.

    Expert 0 (160) to the lightest, device 3; its copies have 80 then, as expert 1 has: again expert 0, to device 2,
    which has less to do than device 1. Expert 1 to device 1; expert 2, the next that device 0 does not hold, there.
    """
    assert added_copies([0, 0, 1, 1, 2, 2, 3, 3], LOAD, 1, 4) == {0: [3, 2], 1: [1], 2: [0]}


def test_a_copy_goes_to_a_node_without_one() -> None:
    """Device 1 has nothing to do, but 2 and 3 stand in the other node: 2 has least there. The busiest copy of expert 0
    still has 50: to the lightest, 1, and to 3. Expert 3 is the heaviest that device 0 does not hold.
    """
    assert added_copies([0, 1, 2, 3], [100, 0, 10, 20], 1, 4, nodes=2) == {0: [2, 1, 3], 3: [0]}


def test_shares() -> None:
    node_D = [0, 0, 1, 1]
    assert shares([0, 2], node_D, 2) == {0: 0.5, 2: 0.5}
    # Node 0's half is shared by two, node 1's has its own copy.
    assert shares([0, 1, 2], node_D, 2) == {0: 0.25, 1: 0.25, 2: 0.5}
    # Nothing in node 1: its half goes to both.
    assert shares([0, 1], node_D, 2) == {0: 0.5, 1: 0.5}


def test_every_expert_everywhere_sends_nothing() -> None:
    chosen = torch.randint(0, 8, (200, 1), generator=torch.Generator().manual_seed(0))
    load = {0: torch.bincount(chosen.flatten(), minlength=8)}
    placed = place({0: torch.zeros(8, 8)}, 4, solver="contiguous", load=load)
    full = add_copies(placed, load, 6)
    assert [sorted(held) for held in full.holders(0)] == [[0, 1, 2, 3]] * 8
    assert simulate(trace_of({0: chosen}, 8), full).total.remote_per_device == 0
    with pytest.raises(BadConfig, match="copies already"):
        add_copies(full, load, 1)


def test_balanced_placement_is_replayed() -> None:
    """A hot expert on all devices: every token finds it at home, and the rest is spread evenly."""
    tokens = torch.stack([torch.zeros(400, dtype=torch.int64), 1 + torch.arange(400) % 7], dim=1)
    trace = trace_of({3: tokens}, 8, documents=400)
    load = {3: torch.bincount(tokens.flatten(), minlength=8)}
    placed = place_by_load(load, 4, 1, fingerprint="model-a")
    assert placed.solver == "eplb"
    assert sorted(placed.holders(3)[0]) == [0, 1, 2, 3]
    assert [sum(d in held for held in placed.holders(3)) for d in range(4)] == [3, 3, 3, 3]
    plain = place({3: torch.zeros(8, 8)}, 4, solver="contiguous", load=load)
    before, after = simulate(trace, plain), simulate(trace, placed)
    # Expert 0 is half of all choices: its device has 400 + 58 of 800.
    assert before.imbalance == pytest.approx(458 / 200)
    assert after.imbalance < 1.3
    assert after.total.rows_once_per_expert == before.total.rows_once_per_expert == 800
    with pytest.raises(BadConfig, match="8 experts cannot be placed on 9"):
        place_by_load(load, 9)


def test_nodes_are_respected_where_they_can_be() -> None:
    load = {0: torch.tensor(LOAD)}
    inside = place_by_load(load, 4, 1, nodes=2, routing_groups=4)
    assert [sorted(held) for held in inside.holders(0)] == [[0, 1], [0, 1], [2, 3], [2, 3], [2], [3], [0], [1]]
    # Five slots a device are more than a node's four experts; three devices do not stand in two equal nodes.
    anywhere = place_by_load(load, 4, 3, nodes=2, routing_groups=4)
    assert {device // 2 for device in anywhere.holders(0)[0]} == {0, 1}
    assert place_by_load(load, 3, 1, nodes=2).nodes == 2
