"""Any loads and sizes: every expert somewhere, equal slots everywhere, copies apart where asked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from moekit.placement.redundancy import added_copies, place_by_load, shares
from moekit.placement.replicas import replicate_experts
from moekit.placement.topology import node_of_devices

loads = st.integers(0, 1000).map(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, int, int, int]:
    """Loads, slots, devices, nodes, groups."""
    nodes = draw(st.integers(1, 3))
    inside = draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 2)) if draw(st.booleans()) else draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 5))
    devices = nodes * inside
    whole = nodes if groups % nodes == 0 else 1
    fewest = -(-experts // devices)
    most = max(fewest, experts // whole)
    slots = draw(st.integers(fewest, most)) * devices
    return draw(st.lists(loads, min_size=experts, max_size=experts)), slots, devices, nodes, groups


@settings(deadline=None, max_examples=300)
@given(problems(), st.booleans())
def test_slots(problem: tuple[list[float], int, int, int, int], distinct: bool) -> None:
    load, slots, devices, nodes, groups = problem
    experts = len(load)
    whole = nodes if groups % nodes == 0 else 1
    if distinct and slots // devices > experts // whole:
        return
    found = replicate_experts(load, slots, devices, nodes=nodes, groups=groups, distinct=distinct)
    assert len(found.expert_P) == slots
    assert found.slots * devices == slots
    assert all(count >= 1 for count in found.count_E)
    for expert, row in enumerate(found.slot_EC):
        own = [slot for slot in row if slot >= 0]
        assert sorted(own) == [slot for slot, held in enumerate(found.expert_P) if held == expert]
        assert len(own) == found.count_E[expert]
        assert row == (*own, *[-1] * (len(row) - len(own)))
        assert found.holders[expert] == list(dict.fromkeys(slot // found.slots for slot in own))
        if distinct:
            assert len(found.holders[expert]) == found.count_E[expert]
        # All copies stand in one node where nodes are respected.
        assert len({device // (devices // whole) for device in found.holders[expert]}) == 1
    share = [load[e] / found.count_E[e] for e in found.expert_P]
    for device, total in enumerate(found.load(load)):
        assert total == pytest.approx(sum(share[device * found.slots : (device + 1) * found.slots]))
    assert sum(found.load(load)) == pytest.approx(sum(load))


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_added(data: st.DataObject, nodes: int, inside: int, own: int, redundant: int) -> None:
    devices = nodes * inside
    device_of_E = data.draw(st.permutations([d for d in range(devices) for _ in range(own)]))
    redundant = min(redundant, len(device_of_E) - own)
    load = data.draw(st.lists(loads, min_size=len(device_of_E), max_size=len(device_of_E)))
    found = added_copies(device_of_E, load, redundant, devices, nodes=nodes)
    held = [[d, *found.get(e, [])] for e, d in enumerate(device_of_E)]
    assert all(len(set(row)) == len(row) for row in held)
    assert [sum(d in row for row in held) for d in range(devices)] == [own + redundant] * devices
    node_D = node_of_devices(devices, nodes)
    for row in held:
        assert sum(shares(row, node_D, nodes).values()) == pytest.approx(1)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 6), st.integers(0, 6), st.integers(0, 3))
def test_placed_by_load(data: st.DataObject, devices: int, more: int, redundant: int) -> None:
    """A placement is checked by its own class: owners and copies on distinct devices."""
    import torch

    experts = devices + more
    redundant = min(redundant, experts - -(-experts // devices))
    load = data.draw(st.lists(loads, min_size=experts, max_size=experts))
    placed = place_by_load({0: torch.tensor(load)}, devices, redundant)
    slots = -(-experts // devices) + redundant
    assert [sum(d in row for row in placed.holders(0)) for d in range(devices)] == [slots] * devices
