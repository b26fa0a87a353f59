"""The figures of a replay, their sums and shares.

Legend: D devices, E experts, K choices a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from moekit.errors import BadConfig
from moekit.placement.objective import balanced_sizes
from moekit.placement.topology import node_of_devices


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """Exact counts of one layer, or the sum over several.

    Attributes:
        tokens: tokens times layers.
        devices: D.
        nodes: nodes the devices stand in.
        rows_once_per_expert: valid choices.
        rows_once_per_device: distinct devices, summed over tokens.
        rows_once_per_node: distinct nodes, summed over tokens.
        single: tokens with at least one expert: the fewest rows any placement could send.
        load_D: choices computed by each device.
        rows_D: rows each device receives, once per device, its own tokens' included.
        expert_rows_DD: rows from home to device, once per expert; the diagonal stays at home. None without homes.
        device_rows_DD: the same, once per device.
        node_rows_DD: the same, once per node and handed on inside.
    """

    tokens: int
    devices: int
    nodes: int
    rows_once_per_expert: int
    rows_once_per_device: int
    rows_once_per_node: int
    single: int
    load_D: torch.Tensor
    rows_D: torch.Tensor
    expert_rows_DD: torch.Tensor | None = None
    device_rows_DD: torch.Tensor | None = None
    node_rows_DD: torch.Tensor | None = None

    def __add__(self, other: ReplayResult) -> ReplayResult:
        """Counts of both together.

        Raises:
            BadConfig: other numbers of devices or nodes, or homes known on one side only.
        """
        alike = (self.devices, self.nodes, self.device_rows_DD is None)
        if alike != (other.devices, other.nodes, other.device_rows_DD is None):
            raise BadConfig("replays with different devices, nodes or homes cannot be added")
        values: dict[str, Any] = {}
        for field in fields(self):
            mine, yours = getattr(self, field.name), getattr(other, field.name)
            values[field.name] = mine if field.name in {"devices", "nodes"} or mine is None else mine + yours
        return ReplayResult(**values)

    @property
    def rows_per_token(self) -> float:
        """Rows a token sends once per device; 0 without tokens."""
        return self.rows_once_per_device / self.tokens if self.tokens else 0.0

    @property
    def saved(self) -> float:
        """Share of the once-per-expert rows that once per device spares."""
        return 1.0 - self.rows_once_per_device / self.rows_once_per_expert if self.rows_once_per_expert else 0.0

    @property
    def kept(self) -> float:
        """Share of the avoidable rows that is avoided, in [0, 1]; f for K = 2."""
        avoidable = self.rows_once_per_expert - self.single
        return (self.rows_once_per_expert - self.rows_once_per_device) / avoidable if avoidable else 1.0

    @property
    def max_over_mean(self) -> float:
        """Largest device load over the mean."""
        mean = float(self.load_D.double().mean())
        return float(self.load_D.max()) / mean if mean else 1.0

    def _remote(self, rows_DD: torch.Tensor | None, across: bool) -> int | None:
        if rows_DD is None:
            return None
        node_D = torch.tensor(node_of_devices(self.devices, self.nodes)) if across else torch.arange(self.devices)
        return int(rows_DD[node_D[:, None] != node_D[None, :]].sum())

    @property
    def remote_per_expert(self) -> int | None:
        """Once-per-expert rows that leave their home device."""
        return self._remote(self.expert_rows_DD, False)

    @property
    def remote_per_device(self) -> int | None:
        """Once-per-device rows that leave their home device."""
        return self._remote(self.device_rows_DD, False)

    @property
    def across_per_expert(self) -> int | None:
        """Once-per-expert rows that leave their node."""
        return self._remote(self.expert_rows_DD, True)

    @property
    def across_per_device(self) -> int | None:
        """Once-per-device rows that leave their node."""
        return self._remote(self.device_rows_DD, True)

    @property
    def across_per_node(self) -> int | None:
        """Once-per-node rows that leave their node: the fewest possible."""
        return self._remote(self.node_rows_DD, True)

    def as_dict(self) -> dict[str, Any]:
        """Counts and shares as JSON holds them."""
        return {
            "tokens": self.tokens,
            "devices": self.devices,
            "nodes": self.nodes,
            "rows_once_per_expert": self.rows_once_per_expert,
            "rows_once_per_device": self.rows_once_per_device,
            "rows_once_per_node": self.rows_once_per_node,
            "rows_per_token": self.rows_per_token,
            "saved": self.saved,
            "kept": self.kept,
            "remote_per_expert": self.remote_per_expert,
            "remote_per_device": self.remote_per_device,
            "across_per_expert": self.across_per_expert,
            "across_per_device": self.across_per_device,
            "across_per_node": self.across_per_node,
            "load": self.load_D.tolist(),
            "max_over_mean": self.max_over_mean,
        }


def expected_devices(experts: int, devices: int, top_k: int, sizes: Sequence[int] | None = None) -> float:
    """Devices a token touches if its experts are distinct and uniformly random: the honest baseline of any placement.

    sum_d (1 - C(E - s_d, K) / C(E, K)), which is D (1 - C(E - E/D, K) / C(E, K)) for equal blocks.

    Args:
        experts: E.
        devices: D.
        top_k: K.
        sizes: experts per device; default balanced.

    Raises:
        BadConfig: K > E.
    """
    if not 0 <= top_k <= experts:
        raise BadConfig(f"no token can choose {top_k} of {experts} experts", hint=f"choose 0 to {experts}")
    blocks = balanced_sizes(experts, devices) if sizes is None else sizes
    return sum(1.0 - math.comb(experts - size, top_k) / math.comb(experts, top_k) for size in blocks)
