"""What the ways to send rows cost on given links: rows, bytes each way and seconds, per kind of link, layer by layer.

A row on the way out is packed as `[hidden state | router weights of its slots | local ids of its slots]` in words of at
least four bytes, as `moekit.parallel` sends it; on the way back it is the hidden state alone. How many rows there are
comes from the exact replay, never from a formula.

- *once per expert*: one slot a row;
- *once per device*: as many slots as a token may choose experts on one device;
- *hierarchical*: to the other nodes first, then inside them; the two follow each other, so their times add up, whereas
  links of both kinds work at the same time otherwise.

Legend: N tokens, K choices, H hidden size, E experts, D devices, M nodes, L layers, S slots a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

from moekit.errors import BadConfig
from moekit.placement.cost_model import Cost, LinkCost, Payload, cost
from moekit.placement.plan import Placement
from moekit.placement.replaying import Home
from moekit.placement.result import ReplayResult
from moekit.placement.simulation import Simulation, simulate
from moekit.placement.topology import LinkClass, Topology, node_of_devices

if TYPE_CHECKING:
    from moekit.trace.store import Trace

Sending = Literal["once per expert", "once per device", "hierarchical"]
SENDINGS: tuple[Sending, ...] = ("once per expert", "once per device", "hierarchical")
_WORD = 4


def row_metadata(hidden: int, itemsize: int, slots: int, most: int, weight_itemsize: int = 4, ids: bool = True) -> int:
    """Bytes of a packed row beside its H numbers: router weights, local ids, and padding to whole words.

    Args:
        hidden: H.
        itemsize: bytes of a hidden state's number.
        slots: S.
        most: largest local id, which stands for no expert.
        weight_itemsize: bytes of a router weight.
        ids: whether ids travel along, as they do in forward; in backward gradients of the weights travel alone.
    """
    word = max(_WORD, itemsize, weight_itemsize)
    state, weights = _padded(hidden * itemsize, word), _padded(slots * weight_itemsize, word)
    numbers = slots * (1 if most < 256 else 2) if ids else 0
    return _padded(state + weights + numbers, word) - hidden * itemsize


def _padded(nbytes: int, word: int) -> int:
    return nbytes + -nbytes % word


@dataclass(frozen=True)
class RowFormat:
    """Numbers of a row.

    Attributes:
        hidden: H.
        itemsize: bytes of a hidden state's number; 2 for bf16.
        weight_itemsize: bytes of a router weight.
    """

    hidden: int
    itemsize: int = 2
    weight_itemsize: int = 4

    def payload(self, slots: int, most: int, *, ids: bool = True) -> Payload:
        """Bytes of a row with so many slots."""
        extra = row_metadata(self.hidden, self.itemsize, slots, most, self.weight_itemsize, ids)
        return Payload(hidden=self.hidden, itemsize=self.itemsize, metadata=extra)


@dataclass(frozen=True)
class Held:
    """Experts that the devices and nodes of one layer hold, copies included; they decide slots and id sizes.

    Attributes:
        device: experts of the device that holds most.
        node: experts of the node that holds most.
        top_k: K.
    """

    device: int
    node: int
    top_k: int

    @classmethod
    def of(cls, holders: Sequence[Sequence[int]], devices: int, nodes: int, top_k: int) -> Held:
        """From the devices that hold each expert."""
        node_D = node_of_devices(devices, nodes)
        per_device, per_node = [0] * devices, [0] * nodes
        for held in holders:
            for device in set(held):
                per_device[device] += 1
            for node in {node_D[device] for device in held}:
                per_node[node] += 1
        return cls(max(per_device), max(per_node), top_k)

    def payloads(self, sending: Sending, form: RowFormat, *, ids: bool = True) -> tuple[Payload, Payload]:
        """Bytes of a row inside a node and of one across nodes."""
        if sending == "once per expert":
            both = form.payload(1, self.device, ids=ids)
            return both, both
        inside = form.payload(max(1, min(self.top_k, self.device)), self.device, ids=ids)
        if sending == "once per device":
            return inside, inside
        return inside, form.payload(max(1, min(self.top_k, self.node)), self.node, ids=ids)


def price(result: ReplayResult, sending: Sending, topology: Topology, payloads: tuple[Payload, Payload]) -> Cost:
    """Price one layer's exchange there and back.

    Args:
        result: a replay with homes.
        sending: how rows are sent.
        topology: its devices and nodes.
        payloads: bytes of a row inside a node and across.

    Raises:
        BadConfig: a replay without homes, or of another topology.
    """
    rows_DD = {
        "once per expert": result.expert_rows_DD,
        "once per device": result.device_rows_DD,
        "hierarchical": result.node_rows_DD,
    }[sending]
    if rows_DD is None or result.nodes != topology.nodes:
        raise BadConfig(
            f"a replay on {result.nodes} nodes, {'with' if rows_DD is not None else 'without'} homes, cannot be priced "
            f"on {topology.nodes}",
            hint="replay with homes (home='round-robin') and with the nodes of the topology",
        )
    inside, across = (cost(rows_DD, topology, payload, result.load_D) for payload in payloads)
    links: dict[LinkClass, LinkCost] = {**inside.links, "inter": across.links["inter"]}
    merge = sum if sending == "hierarchical" else max
    return Cost(
        links=links,
        seconds_out=merge([link.seconds_out for link in links.values()]),
        seconds_back=merge([link.seconds_back for link in links.values()]),
        load=inside.load,
        max_over_mean=inside.max_over_mean,
    )


def add_costs(first: Cost, second: Cost) -> Cost:
    """Both exchanges, one after the other: everything adds up.

    `max_over_mean` is then that of the summed loads, which hides that devices wait for the slowest in every layer.
    """
    links: dict[LinkClass, LinkCost] = {
        name: LinkCost(
            one.rows + two.rows,
            one.bytes_out + two.bytes_out,
            one.bytes_back + two.bytes_back,
            one.seconds_out + two.seconds_out,
            one.seconds_back + two.seconds_back,
        )
        for name, one, two in ((name, first.links[name], second.links[name]) for name in first.links)
    }
    load = [a + b for a, b in zip(first.load, second.load, strict=True)]
    return Cost(
        links=links,
        seconds_out=first.seconds_out + second.seconds_out,
        seconds_back=first.seconds_back + second.seconds_back,
        load=load,
        max_over_mean=max(load) * len(load) / sum(load) if sum(load) else 1.0,
    )


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a trace would cost under a placement, all layers, as one exchange a layer.

    Attributes:
        simulation: exact rows and load.
        costs: way of sending -> price.
    """

    simulation: Simulation
    costs: Mapping[Sending, Cost]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        total = self.simulation.total
        return {
            "tokens": total.tokens,
            "load": total.load_D.tolist(),
            "imbalance": self.simulation.imbalance,
            "worst_imbalance": self.simulation.worst_imbalance,
            "sending": {name: _as_dict(price, total.tokens) for name, price in self.costs.items()},
        }


def _as_dict(price: Cost, tokens: int) -> dict[str, Any]:
    values = price.as_dict()
    for name in ("load", "max_over_mean"):
        del values[name]
    return {**values, "bytes_per_token": price.bytes / tokens if tokens else 0.0}


def predict_sending(
    trace: Trace,
    placement: Placement,
    topology: Topology,
    *,
    itemsize: int = 2,
    weight_itemsize: int = 4,
    home: Home = "round-robin",
) -> Prediction:
    """Rows, bytes each way and seconds per kind of link, for every way of sending.

    Args:
        trace: with choices kept.
        placement: for the same model, devices and nodes.
        topology: its links.
        itemsize: bytes of a hidden state's number.
        weight_itemsize: bytes of a router weight.
        home: device of each token, see `replay`.

    Raises:
        BadConfig: trace, placement and topology do not belong together.
    """
    if (placement.devices, placement.nodes) != (topology.devices, topology.nodes):
        raise BadConfig(
            f"a placement on {placement.devices} devices in {placement.nodes} nodes does not fit a topology of "
            f"{topology.devices} in {topology.nodes}",
            hint="place with the same --devices and --nodes",
        )
    simulation = simulate(trace, placement, home=home)
    form = RowFormat(trace.meta.hidden, itemsize, weight_itemsize)
    costs: dict[Sending, list[Cost]] = {name: [] for name in SENDINGS}
    for layer, result in simulation.layers.items():
        held = Held.of(placement.holders(layer), placement.devices, placement.nodes, trace.meta.top_k_of(layer))
        for name in SENDINGS:
            costs[name].append(price(result, name, topology, held.payloads(name, form)))
    return Prediction(simulation, {name: reduce(add_costs, found) for name, found in costs.items()})
