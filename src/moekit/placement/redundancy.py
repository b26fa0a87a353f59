"""Placements with copies: spare room on every device, filled with the experts that need it most.

Two ways. *Added*: a placement keeps its owners, and with them the co-activation it keeps together; the redundant slots
take copies. *By load*: owners and copies alike are chosen as EPLB does, from load alone.

Either way no device holds an expert twice: what EPLB may do there would fill a slot without taking any load.

Legend: E experts, D devices, L layers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moekit._progress import Progress, track
from moekit.errors import BadConfig
from moekit.placement.plan import Placement
from moekit.placement.replicas import replicate_experts
from moekit.placement.topology import node_of_devices

BY_LOAD = "eplb"


def added_copies(
    device_of_E: Sequence[int], load_E: Sequence[float], redundant: int, devices: int, *, nodes: int = 1
) -> dict[int, list[int]]:
    """Fill the redundant slots: a copy of the expert whose busiest copy has most to do, until no slot is free.

    A copy goes to a device with a free slot that does not hold the expert: in a node that does not hold it either, if
    there is one, then where the load is least. What each copy has to do is estimated by `shares`.

    Args:
        device_of_E: owner of each expert.
        load_E: choices of each expert.
        redundant: slots of each device beyond the experts it owns.
        devices: D.
        nodes: nodes, filled one after the other.

    Returns:
        Expert -> further devices, in the order they were chosen.

    Raises:
        BadConfig: more slots on a device than experts it does not own.
    """
    owned = [list(device_of_E).count(device) for device in range(devices)]
    if not 0 <= redundant <= len(device_of_E) - max(owned):
        most = len(device_of_E) - max(owned)
        raise BadConfig(
            f"{redundant} redundant slots cannot be filled: a device owns {max(owned)} of {len(device_of_E)} experts",
            hint=f"choose 0 to {most} redundant slots; with {most} every device holds every expert",
        )
    node_D, free_D = node_of_devices(devices, nodes), [redundant] * devices
    holders = [[device] for device in device_of_E]
    load_D = [0.0] * devices
    for device, load in zip(device_of_E, load_E, strict=True):
        load_D[device] += load
    heap = [(-load, expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    while heap and any(free_D):
        _, expert = heapq.heappop(heap)
        held = holders[expert]
        open_ = [device for device in range(devices) if free_D[device] and device not in held]
        if not open_:
            continue
        near = {node_D[device] for device in held}
        target = min((node_D[device] in near, load_D[device], device) for device in open_)[-1]
        for sign in (-1, 1):
            for device, share in shares(held, node_D, nodes).items():
                load_D[device] += sign * share * load_E[expert]
            held = [*held, target] if sign < 0 else held
        free_D[target] -= 1
        holders[expert] = held
        heapq.heappush(heap, (-load_E[expert] * max(shares(held, node_D, nodes).values()), expert))
    return {expert: held[1:] for expert, held in enumerate(holders) if len(held) > 1}


def shares(held: Sequence[int], node_D: Sequence[int], nodes: int) -> dict[int, float]:
    """Share of an expert's load that each holder takes if every node has as many tokens for it.

    A node with copies serves its own tokens, its copies in turn; the tokens of the others go to all copies in turn.
    """
    here = Counter(node_D[device] for device in held)
    elsewhere = (nodes - len(here)) / nodes / len(held)
    return {device: 1 / nodes / here[node_D[device]] + elsewhere for device in held}


def add_copies(placement: Placement, load: Mapping[int, torch.Tensor], redundant: int) -> Placement:
    """A placement with the same owners, and copies in `redundant` more slots of each device.

    Args:
        placement: without copies.
        load: decoder layer -> choices of each expert [E].
        redundant: slots of each device beyond the experts it owns.

    Raises:
        BadConfig: there are copies already, or no room for so many.
    """
    if any(placement.replicas.values()):
        raise BadConfig("this placement has copies already", hint="add copies to one that has none")
    replicas = {
        layer: added_copies(groups, load[layer].double().tolist(), redundant, placement.devices, nodes=placement.nodes)
        for layer, groups in placement.layers.items()
    }
    return placement.model_copy(update={"replicas": replicas, "config": {**placement.config, "redundant": redundant}})


def place_by_load(
    load: Mapping[int, torch.Tensor],
    devices: int,
    redundant: int = 0,
    *,
    nodes: int = 1,
    routing_groups: int = 1,
    fingerprint: str = "",
    trace: str = "",
    progress: Progress | None = None,
) -> Placement:
    """Owners and copies by load alone, as EPLB balances them, and never two copies on one device.

    Every device gets ceil(E / D) + redundant slots. Of an expert's holders the one that owns least so far is its owner,
    experts with the fewest copies first.

    Args:
        load: decoder layer -> choices of each expert [E].
        devices: D.
        redundant: slots of each device beyond ceil(E / D).
        nodes: nodes, respected where they divide devices and routing groups and hold experts enough for all slots.
        routing_groups: groups of neighbouring experts that a token's choice is limited to.
        fingerprint: of the model.
        trace: hash of the trace.
        progress: told once a layer.

    Raises:
        BadConfig: see `replicate_experts`.
    """
    layers: dict[int, list[int]] = {}
    replicas: dict[int, dict[int, list[int]]] = {}
    for layer in track(sorted(load), f"balancing {devices} devices", progress, len(load)):
        experts = len(load[layer])
        if devices > experts:
            raise BadConfig(f"{experts} experts cannot be placed on {devices} devices", hint=f"choose 1 to {experts}")
        each = -(-experts // devices) + redundant
        whole = devices % nodes == 0 and routing_groups % nodes == 0 and each <= experts // nodes
        inside = {"nodes": nodes, "groups": routing_groups} if whole else {}
        found = replicate_experts(load[layer], each * devices, devices, distinct=True, **inside).holders
        layers[layer], replicas[layer] = _owners(found, devices)
    config: dict[str, Any] = {"redundant": redundant}
    return Placement(
        fingerprint=fingerprint,
        trace=trace,
        devices=devices,
        nodes=nodes,
        experts=max(map(len, layers.values())),
        layers=layers,
        replicas=replicas,
        solver=BY_LOAD,
        config=config,
    )


def _owners(holders: Sequence[Sequence[int]], devices: int) -> tuple[list[int], dict[int, list[int]]]:
    owned, owner_E = [0] * devices, [0] * len(holders)
    for expert in sorted(range(len(holders)), key=lambda e: len(holders[e])):
        owner_E[expert] = min(holders[expert], key=lambda device: (owned[device], device))
        owned[owner_E[expert]] += 1
    further = {e: [d for d in held if d != owner_E[e]] for e, held in enumerate(holders) if len(held) > 1}
    return owner_E, further
