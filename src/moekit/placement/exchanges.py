"""Time and bytes of one layer's exchange by each dispatcher: four journeys of a row, forward and backward.

Legend: B tokens a rank, K choices, H hidden size, D ranks, M nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moekit.placement.cost_model import port_seconds
from moekit.placement.result import ReplayResult
from moekit.placement.sending import Held, RowFormat, Sending
from moekit.placement.topology import LINK_CLASSES, Topology

Dispatch = Literal["once-per-expert", "once-per-rank", "hierarchical", "all-gather"]
DISPATCHES: tuple[Dispatch, ...] = ("once-per-expert", "once-per-rank", "hierarchical", "all-gather")
Journey = Literal["dispatch", "combine", "combine backward", "dispatch backward"]
JOURNEYS: tuple[Journey, ...] = ("dispatch", "combine", "combine backward", "dispatch backward")
# A rank tells every other how many rows it will get.
COUNT_BYTES = 8
_SENDING: dict[Dispatch, Sending] = {
    "once-per-expert": "once per expert",
    "once-per-rank": "once per device",
    "hierarchical": "hierarchical",
}


@dataclass(frozen=True)
class Exchange:
    """Rows of one layer under one dispatcher, and what each weighs.

    Attributes:
        busiest: "intra" and "inter" -> rows through the busiest port of this kind.
        rows: the same -> rows in all.
        row_bytes: journey -> bytes of a row inside a node and across.
        counts: ranks that a rank tells its counts, inside and across.
        serial: whether links of both kinds are used one after the other.
    """

    busiest: Mapping[str, float]
    rows: Mapping[str, int]
    row_bytes: Mapping[Journey, tuple[int, int]]
    counts: tuple[int, int]
    serial: bool

    def seconds(self, journey: Journey, topology: Topology) -> float:
        """Time of the busiest port."""
        inside, across = self.row_bytes[journey]
        return self._both(topology, self.busiest["intra"] * inside, self.busiest["inter"] * across)

    def count_seconds(self, topology: Topology) -> float:
        """Time of the counts."""
        inside, across = self.counts
        return self._both(topology, COUNT_BYTES * inside, COUNT_BYTES * across)

    def _both(self, topology: Topology, inside: float, across: float) -> float:
        intra = topology.intra_latency + inside / topology.intra if inside else 0.0
        inter = topology.inter_latency + across / topology.inter if across else 0.0
        return intra + inter if self.serial else max(intra, inter)

    def nbytes(self, kind: Literal["intra", "inter"], journeys: Sequence[Journey]) -> int:
        """Bytes over all links of a kind, counts left out."""
        place = 0 if kind == "intra" else 1
        return self.rows[kind] * sum(self.row_bytes[journey][place] for journey in journeys)


def exchange_of(
    name: Dispatch, result: ReplayResult, topology: Topology, held: Held, form: RowFormat, tokens: int
) -> Exchange:
    """What a dispatcher does with the rows of one layer.

    Args:
        name: the dispatcher.
        result: replay with homes on this topology.
        topology: ranks and nodes.
        held: how many experts ranks and nodes hold.
        form: numbers of a row.
        tokens: of the rank that has most; all-gather pads to it.
    """
    if name == "all-gather":
        return _all_gather(topology, held, form, tokens)
    rows_DD = {
        "once-per-expert": result.expert_rows_DD,
        "once-per-rank": result.device_rows_DD,
        "hierarchical": result.node_rows_DD,
    }[name]
    assert rows_DD is not None
    sending, serial = _SENDING[name], name == "hierarchical"
    out, grad = held.payloads(sending, form), held.payloads(sending, form, ids=False)
    back = (out[0].back, out[1].back)
    row_bytes: dict[Journey, tuple[int, int]] = {
        "dispatch": (out[0].out, out[1].out),
        "combine": back,
        "combine backward": back,
        "dispatch backward": (grad[0].out, grad[1].out),
    }
    inside = _largest_node(topology)
    counts = (inside - 1, topology.nodes - 1 if serial else topology.devices - inside)
    return Exchange(*_ports(rows_DD, topology), row_bytes, counts, serial)


def _all_gather(topology: Topology, held: Held, form: RowFormat, tokens: int) -> Exchange:
    """All tokens to all ranks, each with its K weights and ids, and sums scattered back; as many rows from everyone."""
    rows_DD = torch.full((topology.devices, topology.devices), tokens)
    out = form.payload(held.top_k, (topology.devices + 1) * (held.device + 1))
    # In backward gradients of states and weights are summed in the wider of their types.
    grad = (form.hidden + held.top_k) * max(form.itemsize, form.weight_itemsize)
    sizes = zip(JOURNEYS, (out.out, out.back, out.back, grad), strict=True)
    inside = _largest_node(topology)
    # One number each: the largest number of tokens.
    counts = (min(1, inside - 1), min(1, topology.devices - inside))
    return Exchange(*_ports(rows_DD, topology), {name: (n, n) for name, n in sizes}, counts, False)


def _largest_node(topology: Topology) -> int:
    return -(-topology.devices // topology.nodes)


def _ports(rows_DD: torch.Tensor, topology: Topology) -> tuple[dict[str, float], dict[str, int]]:
    """Rows through the busiest port, and in all, by kind of link."""
    unit = {"intra": 1.0, "inter": 1.0, "intra_latency": 0.0, "inter_latency": 0.0}
    busiest = port_seconds(rows_DD, topology.model_copy(update=unit))
    kind_DD = topology.link_class_DD()
    rows = {str(name): int(rows_DD[kind_DD == number].sum()) for number, name in enumerate(LINK_CLASSES)}
    return {str(name): value for name, value in busiest.items()}, rows
