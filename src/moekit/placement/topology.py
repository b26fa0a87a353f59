"""Nodes, devices and the speed of the links between them.

Legend: D devices, M nodes.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from moekit.errors import BadConfig
from moekit.placement.objective import balanced_sizes

LinkClass = Literal["local", "intra", "inter"]
LINK_CLASSES: tuple[LinkClass, LinkClass, LinkClass] = ("local", "intra", "inter")

_RATE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kKMGT]i?)?(B|[Bb]ytes?|[Bb]its?|b)(?:/s|ps)\s*")
_TIME = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(ns|us|µs|ms|s)\s*")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_PREFIX = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bandwidth(text: str | float) -> float:
    """Bytes per second from a rate with its unit.

    `B` is bytes and `b` or `bit` is bits, as network cards are sold: "900GB/s" is 9e11, "200Mbit/s" 2.5e7, "400Gbps"
    5e10. Prefixes are powers of 1000, with an `i` ("GiB/s") of 1024. A plain number is bytes per second already.

    Raises:
        BadConfig: no number, no unit, or not positive.
    """
    if not isinstance(text, str):
        rate = float(text)
    else:
        match = _RATE.fullmatch(text)
        if match is None:
            raise BadConfig(
                f"{text!r} is no bandwidth",
                hint="write a number with its unit, such as 900GB/s, 400Gbps or 200Mbit/s (B: bytes, b or bit: bits)",
            )
        prefix, unit = match[2] or "", match[3]
        base = 1024 if prefix.endswith("i") else 1000
        rate = float(match[1]) * base ** _PREFIX[prefix.rstrip("i")]
        rate /= 8 if unit == "b" or unit.lower().startswith("bit") else 1
    if not 0 < rate < float("inf"):
        raise BadConfig(f"a bandwidth of {text!r} moves nothing", hint="give a positive rate, such as 50GB/s")
    return rate


def parse_latency(text: str | None) -> tuple[float, float]:
    """Seconds inside a node and across nodes, from "3us,10us"; a single one is used for both, None is none.

    Raises:
        BadConfig: not one or two durations with their unit.
    """
    if text is None:
        return 0.0, 0.0
    parts = text.split(",")
    matches = [_TIME.fullmatch(part) for part in parts]
    if len(parts) > 2 or not all(matches):
        raise BadConfig(
            f"{text!r} is no latency", hint="write it with its unit (ns, us, ms, s), inside a node and across: 3us,10us"
        )
    seconds = [float(match[1]) * _SECONDS[match[2]] for match in matches if match is not None]
    return seconds[0], seconds[-1]


class Topology(BaseModel):
    """Devices in nodes, and what links them.

    Devices are numbered node by node; nodes of different size differ by at most one device.

    Attributes:
        devices: D.
        nodes: M.
        intra: bytes per second in and out of each device inside its node.
        inter: bytes per second across nodes, in and out of each uplink.
        intra_latency: seconds before the first byte, inside a node.
        inter_latency: the same across nodes.
        uplink: "device" if every device has its own link out of the node, "node" if a node's devices share one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: int = Field(ge=1)
    nodes: int = Field(default=1, ge=1)
    intra: float = Field(default=900e9, gt=0)
    inter: float = Field(default=50e9, gt=0)
    intra_latency: float = Field(default=0.0, ge=0)
    inter_latency: float = Field(default=0.0, ge=0)
    uplink: Literal["device", "node"] = "device"

    @classmethod
    def make(
        cls,
        devices: int,
        nodes: int = 1,
        bandwidth: str | None = None,
        *,
        latency: tuple[float, float] = (0.0, 0.0),
        uplink: Literal["device", "node"] = "device",
    ) -> Topology:
        """A topology as the command line names it.

        Args:
            devices: D.
            nodes: M, at most D.
            bandwidth: "900GB/s,50GB/s": inside a node, then across nodes; a single one is used for both.
            latency: seconds, inside and across.
            uplink: see the class.

        Raises:
            BadConfig: more nodes than devices, or an unreadable bandwidth.
        """
        if not 1 <= nodes <= devices:
            raise BadConfig(f"{devices} devices cannot stand in {nodes} nodes", hint=f"choose 1 to {devices} nodes")
        rates = [parse_bandwidth(part) for part in bandwidth.split(",")] if bandwidth is not None else [900e9, 50e9]
        if len(rates) > 2:
            raise BadConfig(f"{bandwidth!r} names {len(rates)} bandwidths", hint="inside a node, then across nodes")
        return cls(
            devices=devices,
            nodes=nodes,
            intra=rates[0],
            inter=rates[-1],
            intra_latency=latency[0],
            inter_latency=latency[1],
            uplink=uplink,
        )

    @property
    def node_of_D(self) -> list[int]:
        """Node of each device."""
        return node_of_devices(self.devices, self.nodes)

    def link_class_DD(self) -> torch.Tensor:
        """Class of the link from each device to each other: index into `LINK_CLASSES`, [D, D] int64."""
        node_D = torch.tensor(self.node_of_D)
        across_DD = (node_D[:, None] != node_D[None, :]).long() + 1
        return across_DD.fill_diagonal_(0)


def node_of_devices(devices: int, nodes: int) -> list[int]:
    """Node of each device, filled node by node."""
    return [node for node, count in enumerate(balanced_sizes(devices, nodes)) for _ in range(count)]
