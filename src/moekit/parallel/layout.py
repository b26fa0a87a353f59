"""Which rank owns which expert: the table every dispatcher looks its destinations up in.

Expert ids stay logical everywhere above: routers, partner lists and selection biases never hear of a placement. Only
where the weights of an expert live changes, so any placement leaves the choice bit for bit as it was.

Legend: E experts, R ranks, M nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.errors import BadConfig
from moekit.placement.objective import balanced_sizes


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """Owner of every expert of one layer.

    Attributes:
        ranks: R.
        rank_E: rank that owns each expert, and R for index E, "no expert": [E + 1] int64.
        local_E: place of each expert among its owner's; 0 for index E: [E + 1] int64.
        counts: experts of each rank; blocks may be uneven, and empty.
    """

    ranks: int
    rank_E: Tensor
    local_E: Tensor
    counts: tuple[int, ...]

    @classmethod
    def make(cls, rank_of_expert: Sequence[int], ranks: int, device: torch.device | str = "cpu") -> ExpertLayout:
        """From the rank of each expert; inside a rank experts keep their logical order.

        Raises:
            BadConfig: a rank outside 0..R-1.
        """
        for expert, rank in enumerate(rank_of_expert):
            if not 0 <= rank < ranks:
                raise BadConfig(
                    f"this expert is placed on device {rank} of {ranks}",
                    expert=expert,
                    hint="the placement was made for another number of devices: place again with --devices",
                )
        filled, local = [0] * ranks, []
        for rank in rank_of_expert:
            local.append(filled[rank])
            filled[rank] += 1
        rank_E = torch.tensor([*rank_of_expert, ranks], dtype=torch.int64, device=device)
        return cls(ranks, rank_E, torch.tensor([*local, 0], dtype=torch.int64, device=device), tuple(filled))

    @classmethod
    def contiguous(cls, experts: int, ranks: int, device: torch.device | str = "cpu") -> ExpertLayout:
        """Blocks in expert order; where R does not divide E the first ranks hold one more."""
        if ranks > experts:
            raise BadConfig(
                f"{experts} experts cannot be dealt to {ranks} ranks", hint=f"use at most {experts} ranks for experts"
            )
        owner = [rank for rank, count in enumerate(balanced_sizes(experts, ranks)) for _ in range(count)]
        return cls.make(owner, ranks, device)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.rank_E) - 1

    @property
    def most(self) -> int:
        """Experts of the rank that owns most."""
        return max(self.counts)

    def owned(self, rank: int) -> Tensor:
        """Logical ids of a rank's experts, in local order."""
        return (self.rank_E[:-1] == rank).nonzero().flatten()

    def nodes(self, per_node: int) -> tuple[ExpertLayout, list[ExpertLayout]]:
        """Split in two: which node owns an expert, and in each node which of its ranks.

        Local ids of the first are the expert ids of the second.

        Args:
            per_node: ranks of each node, numbered node by node.

        Returns:
            Layout over nodes, and for each node a layout over its ranks.
        """
        device = self.rank_E.device
        outer = ExpertLayout.make((self.rank_E[:-1] // per_node).tolist(), self.ranks // per_node, device)
        inner = [
            ExpertLayout.make((self.rank_E[outer.owned(node)] % per_node).tolist(), per_node, device)
            for node in range(outer.ranks)
        ]
        return outer, inner
