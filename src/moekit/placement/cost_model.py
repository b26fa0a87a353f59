"""What rows cost: bytes each way per kind of link, and the time of the slowest link.

The model is time = alpha + bytes / bandwidth on every port, all ports at once, so that an exchange lasts as long as its
busiest port. Dispatch and combine follow each other. Ports are full duplex; copies inside a device are free.

Legend: D devices, M nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from moekit.errors import BadConfig
from moekit.placement.topology import LINK_CLASSES, LinkClass, Topology


class Payload(BaseModel):
    """Bytes of a row.

    Attributes:
        hidden: H, numbers a row.
        itemsize: bytes a number on the way out (dispatch); 1 for 8-bit dispatch.
        itemsize_back: bytes a number on the way back (combine); default as on the way out.
        metadata: bytes beside each row on the way out: expert ids and weights. 0 where they are implied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int = Field(ge=1)
    itemsize: int = Field(default=2, ge=1)
    itemsize_back: int | None = Field(default=None, ge=1)
    metadata: int = Field(default=0, ge=0)

    @property
    def out(self) -> int:
        """Bytes of a dispatched row."""
        return self.hidden * self.itemsize + self.metadata

    @property
    def back(self) -> int:
        """Bytes of a combined row."""
        return self.hidden * (self.itemsize_back or self.itemsize)


@dataclass(frozen=True)
class LinkCost:
    """What one kind of link carries.

    Attributes:
        rows: rows on the way out; as many come back.
        bytes_out: bytes dispatched.
        bytes_back: bytes combined.
        seconds_out: time of the busiest port of this kind, dispatch.
        seconds_back: the same, combine.
    """

    rows: int
    bytes_out: int
    bytes_back: int
    seconds_out: float
    seconds_back: float


@dataclass(frozen=True)
class Cost:
    """Price of one exchange there and back.

    Attributes:
        links: per kind: "local" (stays on the device), "intra" (inside a node), "inter" (across nodes).
        seconds_out: dispatch: the slowest port of any kind.
        seconds_back: combine.
        load: choices computed per device, if given.
        max_over_mean: largest of them over the mean.
    """

    links: dict[LinkClass, LinkCost]
    seconds_out: float
    seconds_back: float
    load: list[int]
    max_over_mean: float

    @property
    def seconds(self) -> float:
        """Dispatch and combine; training pays about twice that, since backward mirrors forward."""
        return self.seconds_out + self.seconds_back

    @property
    def bytes(self) -> int:
        """Bytes that leave a device, both ways."""
        return sum(link.bytes_out + link.bytes_back for name, link in self.links.items() if name != "local")

    @property
    def busiest(self) -> LinkClass:
        """The kind of link that the exchange waits for."""
        return max(self.links, key=lambda name: self.links[name].seconds_out + self.links[name].seconds_back)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "links": {name: vars(link) for name, link in self.links.items()},
            "seconds_out": self.seconds_out,
            "seconds_back": self.seconds_back,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "busiest": self.busiest,
            "load": self.load,
            "max_over_mean": self.max_over_mean,
        }


def port_seconds(bytes_DD: torch.Tensor, topology: Topology) -> dict[LinkClass, float]:
    """Time of the busiest port of each kind.

    Args:
        bytes_DD: bytes from device to device.
        topology: speeds and latencies.
    """
    kind_DD = topology.link_class_DD()
    intra_DD = torch.where(kind_DD == 1, bytes_DD, 0)
    inter_DD = torch.where(kind_DD == 2, bytes_DD, 0)
    if topology.uplink == "node":
        node_D = torch.tensor(topology.node_of_D)
        onto_DM = torch.nn.functional.one_hot(node_D, topology.nodes)
        inter_DD = onto_DM.T @ inter_DD @ onto_DM
    return {
        "local": 0.0,
        "intra": _busiest(intra_DD, topology.intra, topology.intra_latency),
        "inter": _busiest(inter_DD, topology.inter, topology.inter_latency),
    }


def _busiest(bytes_PP: torch.Tensor, bandwidth: float, latency: float) -> float:
    most = int(torch.maximum(bytes_PP.sum(dim=0), bytes_PP.sum(dim=1)).max())
    return latency + most / bandwidth if most else 0.0


def cost(rows_DD: torch.Tensor, topology: Topology, payload: Payload, load_D: torch.Tensor | None = None) -> Cost:
    """Price the rows of a replay.

    Args:
        rows_DD: rows from home to device, such as `ReplayResult.device_rows_DD`; the diagonal stays on the device.
        topology: devices and links.
        payload: bytes a row.
        load_D: choices computed per device.

    Raises:
        BadConfig: the rows are of another number of devices.
    """
    if rows_DD.shape != (topology.devices, topology.devices):
        raise BadConfig(
            f"rows between {len(rows_DD)} devices do not fit a topology of {topology.devices}",
            hint="replay with the devices of the topology, and with homes (home='round-robin')",
        )
    kind_DD = topology.link_class_DD()
    out, back = port_seconds(rows_DD * payload.out, topology), port_seconds(rows_DD.T * payload.back, topology)
    links: dict[LinkClass, LinkCost] = {}
    for number, name in enumerate(LINK_CLASSES):
        rows = int(rows_DD[kind_DD == number].sum())
        links[name] = LinkCost(rows, rows * payload.out, rows * payload.back, out[name], back[name])
    mean = float(load_D.double().mean()) if load_D is not None else 0.0
    return Cost(
        links=links,
        seconds_out=max(out.values()),
        seconds_back=max(back.values()),
        load=[] if load_D is None else load_D.tolist(),
        max_over_mean=float(load_D.max()) / mean if load_D is not None and mean else 1.0,
    )
