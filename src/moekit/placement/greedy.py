"""Groups by the heaviest pair first, every place filled: the rule behind the greedy solver and a start for others.

Legend: E experts, D devices.
"""

from __future__ import annotations

import numpy as np

from moekit.placement.objective import Floats, Problem


class _Groups:
    """Groups under construction; the first opened may take the largest block."""

    def __init__(self, problem: Problem) -> None:
        self.weight_EE: Floats = problem.weight_EE
        self.devices = sorted(range(problem.devices), key=lambda d: -problem.sizes[d])
        self.free = list(problem.sizes)
        self.device_of = [-1] * problem.experts
        self.affinity_ED = np.zeros((problem.experts, problem.devices))
        self.opened = 0

    def put(self, expert: int, device: int) -> None:
        self.device_of[expert] = device
        self.free[device] -= 1
        self.affinity_ED[:, device] += self.weight_EE[:, expert]

    def put_pair(self, first: int, second: int) -> None:
        """Both experts are free: open a group for them, or join the group that they are closest to."""
        if self.opened < len(self.devices) and self.free[self.devices[self.opened]] >= 2:
            device = self.devices[self.opened]
            self.opened += 1
        else:
            roomy = [d for d in self.devices[: self.opened] if self.free[d] >= 2]
            if not roomy:
                return
            device = max(roomy, key=lambda d: self.affinity_ED[first, d] + self.affinity_ED[second, d])
        self.put(first, device)
        self.put(second, device)

    def repair(self) -> None:
        """Give every expert left over the free place it is closest to, the most attached first."""
        left = [e for e, d in enumerate(self.device_of) if d < 0]
        while left:
            roomy = [d for d, places in enumerate(self.free) if places]
            closeness = self.affinity_ED[np.ix_(left, roomy)]
            best, device = divmod(int(np.argmax(closeness)), len(roomy))
            self.put(left.pop(best), roomy[device])


def greedy_groups(problem: Problem) -> list[int]:
    """Device of each expert by the heaviest-pair rule."""
    groups = _Groups(problem)
    rows, columns = np.triu_indices(problem.experts, 1)
    weight_P = problem.weight_EE[rows, columns]
    for pair in np.argsort(-weight_P, kind="stable"):
        if weight_P[pair] <= 0:
            break
        first, second = int(rows[pair]), int(columns[pair])
        homes = groups.device_of[first], groups.device_of[second]
        if homes == (-1, -1):
            groups.put_pair(first, second)
        elif -1 in homes and groups.free[max(homes)]:
            groups.put(second if homes[0] >= 0 else first, max(homes))
    groups.repair()
    return groups.device_of
