"""Placing in stages: experts to nodes, then inside each node to devices, with routing groups kept whole.

Some families (DeepSeek's `n_group`) first choose groups of neighbouring experts and then experts inside them. Their
groups may change places, and experts may inside a group, but a group torn apart would be routed differently. So either
a device holds whole groups, or a group is spread over devices of its own.

Legend: E experts, D devices, N tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moekit.errors import BadConfig
from moekit.placement.objective import balanced_sizes, check_sizes, nearest
from moekit.placement.solver import Solver
from moekit.placement.topology import node_of_devices


def check_routing_groups(experts: int, devices: int, nodes: int, groups: int) -> None:
    """Refuse device counts that would tear routing groups apart.

    Raises:
        BadConfig: groups do not divide the experts; nodes do not divide the devices; or either of both neither divides
            the groups nor is a multiple of them.
    """
    if groups <= 1:
        return
    if experts % groups:
        raise BadConfig(f"{groups} routing groups do not divide {experts} experts", hint="check the model's n_group")
    if devices % nodes:
        raise BadConfig(
            f"{nodes} nodes of different size cannot keep the {groups} routing groups of this model whole",
            hint="choose a number of nodes that divides the devices",
        )
    for what, count in (("devices", devices), ("nodes", nodes)):
        if groups % count and count % groups:
            near = nearest(count, [n for n in range(1, experts + 1) if groups % n == 0 or n % groups == 0])
            raise BadConfig(
                f"{count} {what} would tear the {groups} routing groups of this model apart, which changes its routing",
                hint=f"the nearest numbers of {what} that keep them whole are {' and '.join(map(str, near))}",
            )


@dataclass(frozen=True)
class Stage:
    """What every stage of a hierarchical placement shares.

    Attributes:
        solver: used for each cut.
        coactivation_EE: counts of the whole layer.
        load_E: choices of each expert.
        indices_NK: tokens for the row objective, or None.
        group_of_E: routing group of each expert.
        seed: of random starts.
    """

    solver: Solver
    coactivation_EE: torch.Tensor
    load_E: torch.Tensor
    indices_NK: torch.Tensor | None
    group_of_E: list[int]
    seed: int

    def cut(self, units: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]]:
        """Solve one cut: units (lists of experts that stay together) into parts of `sizes` units each.

        Returns:
            Experts of each part.
        """
        if len(sizes) == 1:
            return [[e for unit in units for e in unit]]
        experts = len(self.load_E)
        member_UE = torch.zeros(len(units), experts, dtype=torch.float64)
        unit_of_E = torch.full((experts + 1,), len(units), dtype=torch.int64)
        for number, unit in enumerate(units):
            member_UE[number, list(unit)] = 1.0
            unit_of_E[list(unit)] = number
        count_UU = member_UE @ self.coactivation_EE.double() @ member_UE.T
        chosen = None if self.indices_NK is None else unit_of_E[self.indices_NK.long()]
        solution = self.solver.solve(
            count_UU.fill_diagonal_(0.0),
            len(sizes),
            load_E=member_UE @ self.load_E.double(),
            seed=self.seed,
            sizes=sizes,
            indices_NK=chosen,
            bound=False,
        )
        parts: list[list[int]] = [[] for _ in sizes]
        for number, part in enumerate(solution.groups):
            parts[part].extend(units[number])
        return parts

    def split(self, members: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
        """Cut experts into parts of `sizes` experts, routing groups whole or each on parts of its own."""
        groups: dict[int, list[int]] = {}
        for expert in sorted(members):
            groups.setdefault(self.group_of_E[expert], []).append(expert)
        if len(groups) == 1:
            return self.cut([[e] for e in sorted(members)], sizes)
        if len(groups) >= len(sizes):
            return self.cut(list(groups.values()), balanced_sizes(len(groups), len(sizes), equal=True))
        share = len(sizes) // len(groups)
        return [
            part
            for number, experts in enumerate(groups.values())
            for part in self.split(experts, sizes[number * share : (number + 1) * share])
        ]


def _blocks(experts: int, devices: int, routing_groups: int, equal: bool) -> tuple[int, ...]:
    """Balanced sizes; where a group is spread over devices of its own, balanced inside each group."""
    blocks = balanced_sizes(experts, devices, equal=equal)
    if routing_groups <= 1 or devices <= routing_groups:
        return blocks
    return balanced_sizes(experts // routing_groups, devices // routing_groups) * routing_groups


def hierarchical_groups(
    solver: Solver,
    coactivation_EE: torch.Tensor,
    load_E: torch.Tensor,
    devices: int,
    *,
    nodes: int = 1,
    routing_groups: int = 1,
    sizes: Sequence[int] | None = None,
    indices_NK: torch.Tensor | None = None,
    seed: int = 0,
) -> list[int]:
    """Device of each expert, nodes first.

    Raises:
        BadConfig: routing groups would be torn apart, or sizes are impossible.
    """
    experts = len(load_E)
    check_routing_groups(experts, devices, nodes, routing_groups)
    if sizes is not None and routing_groups > 1:
        raise BadConfig("block sizes cannot be chosen where routing groups must stay whole", hint="drop `sizes`")
    blocks = _blocks(experts, devices, routing_groups, solver.equal) if sizes is None else sizes
    blocks = check_sizes(blocks, experts, devices)
    # A single routing group is no constraint: every expert is then a unit of its own.
    group_of_E = [0] * experts if routing_groups <= 1 else [e * routing_groups // experts for e in range(experts)]
    stage = Stage(solver, coactivation_EE, load_E, indices_NK, group_of_E, seed)
    node_D = np.array(node_of_devices(devices, nodes))
    inside = [np.flatnonzero(node_D == node).tolist() for node in range(nodes)]
    groups = [0] * experts
    for members, own in zip(
        stage.split(range(experts), [sum(blocks[d] for d in own) for own in inside]), inside, strict=True
    ):
        for device, held in zip(own, stage.split(members, [blocks[d] for d in own]), strict=True):
            for expert in held:
                groups[expert] = device
    return groups
