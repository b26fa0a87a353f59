"""Copies of heavily loaded experts: how many of each, and on which device, balanced by load alone.

The algorithm is that of EPLB (DeepSeek's expert-parallelism load balancer):

1. groups of experts are packed onto nodes, an equal number to each, heaviest first into the lightest node with room;
2. inside a node the expert with the largest load per copy gets another copy until the node's slots are used up;
3. the copies are packed onto the node's devices as the groups were onto nodes.

Where the nodes do not divide the groups all of it is done once, for a single node and group. Copies share an expert's
load evenly by assumption; `moekit.placement.replaying` counts what a trace really does.

EPLB may put two copies of an expert on one device, where the second helps nobody. `distinct` forbids it: no expert gets
more copies than its node has devices, and none goes where one already lies.

Legend: E experts, D devices, P slots (physical experts) in all, C most copies of an expert.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moekit.errors import BadConfig, BadData
from moekit.placement.objective import nearest


@dataclass(frozen=True)
class Replication:
    """Which expert every slot holds.

    Attributes:
        expert_P: expert of each slot; every device has P / D of them, devices in order.
        slot_EC: slots of each expert by number of the copy, filled up with -1.
        count_E: copies of each expert.
        devices: D.
    """

    expert_P: tuple[int, ...]
    slot_EC: tuple[tuple[int, ...], ...]
    count_E: tuple[int, ...]
    devices: int

    @property
    def slots(self) -> int:
        """Slots of each device."""
        return len(self.expert_P) // self.devices

    @property
    def holders(self) -> list[list[int]]:
        """Devices that hold each expert, by number of the copy; two copies on one device count once."""
        return [list(dict.fromkeys(slot // self.slots for slot in row if slot >= 0)) for row in self.slot_EC]

    def load(self, load_E: Sequence[float] | torch.Tensor) -> list[float]:
        """Load of each device if every copy takes an equal share of its expert's."""
        weights = _weights(load_E)
        sums = [0.0] * self.devices
        for slot, expert in enumerate(self.expert_P):
            sums[slot // self.slots] += weights[expert] / self.count_E[expert]
        return sums

    def max_over_mean(self, load_E: Sequence[float] | torch.Tensor) -> float:
        """Largest of these loads over the mean."""
        loads = self.load(load_E)
        return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def replicate_experts(
    load_E: Sequence[float] | torch.Tensor,
    slots: int,
    devices: int,
    *,
    nodes: int = 1,
    groups: int = 1,
    distinct: bool = False,
) -> Replication:
    """Choose copies and their devices for one layer, as EPLB does.

    Args:
        load_E: choices of each expert, or any estimate of its load.
        slots: P, at least E.
        devices: D, which divides P.
        nodes: nodes, which divide D.
        groups: groups of neighbouring experts that a token's choice is limited to; nodes are respected only where they
            divide the groups.
        distinct: never two copies of an expert on one device.

    Raises:
        BadConfig: numbers that do not divide each other, too few slots, or with `distinct` more slots than copies.
        BadData: loads that are negative or not finite.
    """
    weights = _weights(load_E)
    experts = len(weights)
    _check(experts, slots, devices, nodes, groups)
    if groups % nodes:
        nodes, groups = 1, 1
    inside, size = devices // nodes, experts // groups
    if distinct and slots // devices > experts // nodes:
        raise BadConfig(
            f"{slots // devices} slots a device are more than the {experts // nodes} experts its node holds",
            hint=f"ask for at most {experts // nodes * devices} slots in all, where every device holds all of them",
        )
    node_of_group = pack([sum(weights[g * size : (g + 1) * size]) for g in range(groups)], nodes)
    expert_P: list[int] = []
    copy_P: list[int] = []
    for members in node_of_group:
        local = [g * size + offset for g in members for offset in range(size)]
        own = [weights[e] for e in local]
        copies = duplicate(own, slots // nodes, most=inside if distinct else None)
        share = [own[e] / copies.count_E[e] for e in copies.expert_P]
        packs = pack(share, inside, copies.expert_P if distinct else None)
        for slot in (slot for pack_ in packs for slot in pack_):
            expert_P.append(local[copies.expert_P[slot]])
            copy_P.append(copies.copy_P[slot])
    return _replication(expert_P, copy_P, experts, devices)


def _replication(expert_P: Sequence[int], copy_P: Sequence[int], experts: int, devices: int) -> Replication:
    count_E = [0] * experts
    for expert in expert_P:
        count_E[expert] += 1
    slot_EC = [[-1] * max(count_E) for _ in range(experts)]
    for slot, (expert, copy) in enumerate(zip(expert_P, copy_P, strict=True)):
        slot_EC[expert][copy] = slot
    return Replication(tuple(expert_P), tuple(map(tuple, slot_EC)), tuple(count_E), devices)


@dataclass(frozen=True)
class Copies:
    """Expert and number of the copy of each slot, before slots lie on devices; and copies of each expert."""

    expert_P: list[int]
    copy_P: list[int]
    count_E: list[int]


def duplicate(load_E: Sequence[float], slots: int, *, most: int | None = None) -> Copies:
    """Give one more copy to the expert with the largest load per copy until the slots are used up; ties to the lowest.

    Args:
        load_E: loads.
        slots: P, at least E.
        most: copies that an expert may have.
    """
    expert_P, copy_P = list(range(len(load_E))), [0] * len(load_E)
    count_E = [1] * len(load_E)
    heap = [(-load, expert) for expert, load in enumerate(load_E) if most is None or most > 1]
    heapq.heapify(heap)
    while len(expert_P) < slots:
        _, expert = heapq.heappop(heap)
        expert_P.append(expert)
        copy_P.append(count_E[expert])
        count_E[expert] += 1
        if most is None or count_E[expert] < most:
            heapq.heappush(heap, (-load_E[expert] / count_E[expert], expert))
    return Copies(expert_P, copy_P, count_E)


def pack(weights: Sequence[float], packs: int, apart: Sequence[int] | None = None) -> list[list[int]]:
    """Deal items out to packs, an equal number to each: heaviest first, into the lightest pack with room.

    Ties go to the lowest item and the lowest pack. Where every pack holds one item they stay in order.

    Args:
        weights: of the items; their number is a multiple of the packs.
        packs: how many.
        apart: kind of each item; no pack gets two of one kind. Needs at most as many of a kind as there are packs.

    Returns:
        Items of each pack, in the order they came.
    """
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    heap = [(0.0, number) for number in range(packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        passed = []
        while heap:
            load, number = heapq.heappop(heap)
            if apart is None or all(apart[other] != apart[item] for other in found[number]):
                found[number].append(item)
                if len(found[number]) < room:
                    passed.append((load + weights[item], number))
                break
            passed.append((load, number))
        else:
            assert apart is not None
            passed = _make_room(found, item, weights, apart, room)
        for entry in passed:
            heapq.heappush(heap, entry)
    return found


def _make_room(
    found: list[list[int]], item: int, weights: Sequence[float], apart: Sequence[int], room: int
) -> list[tuple[float, int]]:
    """All packs with room hold the item's kind: a full pack without it takes it and gives another away.

    One always can: it holds `room` kinds, the one with room fewer and among them the item's, so at least two of the
    full pack's are new to the other.

    Returns:
        Loads and numbers of the packs that still have room.
    """

    def load(number: int) -> float:
        return sum(weights[other] for other in found[number])

    kinds = [{apart[other] for other in held} for held in found]
    free = min((n for n, held in enumerate(found) if len(held) < room), key=lambda n: (load(n), n))
    swaps = [
        (max(load(full) - weights[other] + weights[item], load(free) + weights[other]), full, other)
        for full, held in enumerate(found)
        if apart[item] not in kinds[full]
        for other in held
        if apart[other] not in kinds[free]
    ]
    _, full, other = min(swaps)
    found[full].remove(other)
    found[full].append(item)
    found[free].append(other)
    return [(load(n), n) for n, held in enumerate(found) if len(held) < room]


def _weights(load_E: Sequence[float] | torch.Tensor) -> list[float]:
    tensor = torch.as_tensor(load_E, dtype=torch.float64)
    if tensor.dim() != 1 or not len(tensor):
        raise BadData(f"loads must be [E], not {list(tensor.shape)}")
    if not bool(tensor.isfinite().all()) or float(tensor.min()) < 0:
        expert = int((~(tensor.isfinite() & (tensor >= 0))).nonzero()[0])
        raise BadData("a load must be finite and not negative", expert=expert, hint="record the trace again")
    return [float(value) for value in tensor]


def _check(experts: int, slots: int, devices: int, nodes: int, groups: int) -> None:
    if min(devices, nodes, groups) < 1 or devices % nodes:
        raise BadConfig(f"{devices} devices do not stand in {nodes} equal nodes", hint="choose nodes that divide them")
    if experts % groups:
        raise BadConfig(f"{groups} groups do not divide {experts} experts", hint="check the model's n_group")
    if slots % devices or slots < experts:
        legal = [n * devices for n in range(-(-experts // devices), experts + 1)]
        near = " or ".join(map(str, [slots] if slots in legal else nearest(slots, legal)))
        raise BadConfig(
            f"{slots} slots do not hold {experts} experts with an equal number on each of {devices} devices",
            hint=f"the nearest legal numbers of slots are {near}",
        )
