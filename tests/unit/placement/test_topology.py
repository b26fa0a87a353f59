"""Bandwidths with units, link classes, and the time of the busiest port."""

from __future__ import annotations

import pytest
import torch

from moekit.errors import BadConfig
from moekit.placement.cost_model import Payload, cost, port_seconds
from moekit.placement.replaying import replay
from moekit.placement.topology import LINK_CLASSES, Topology, parse_bandwidth


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("900GB/s", 900e9),
        ("200Mbit/s", 25e6),
        ("1 Gbit/s", 125e6),
        ("400Gbps", 50e9),
        ("400 Gb/s", 50e9),
        ("50GBps", 50e9),
        ("1.5GiB/s", 1.5 * 2**30),
        ("10 MiB/s", 10 * 2**20),
        ("8bit/s", 1.0),
        ("64 bytes/s", 64.0),
        ("2e3kB/s", 2e6),
        (".5TB/s", 5e11),
        (1e9, 1e9),
    ],
)
def test_bandwidths(text: str | float, rate: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["900", "GB/s", "900GB", "-5GB/s", "900 parsecs/s", "", "0GB/s", 0.0, "1e999GB/s"])
def test_no_bandwidth(text: str | float) -> None:
    with pytest.raises(BadConfig, match="bandwidth") as caught:
        parse_bandwidth(text)
    assert caught.value.hint


def test_as_the_command_line_says_it() -> None:
    topology = Topology.make(8, 2, "900GB/s,50GB/s")
    assert (topology.intra, topology.inter) == (900e9, 50e9)
    assert topology.node_of_D == [0, 0, 0, 0, 1, 1, 1, 1]
    assert Topology.make(5, 2).node_of_D == [0, 0, 0, 1, 1]
    assert Topology.make(4, 1, "10GB/s").inter == 10e9
    with pytest.raises(BadConfig, match="3 bandwidths"):
        Topology.make(4, 2, "1GB/s,2GB/s,3GB/s")
    with pytest.raises(BadConfig, match="5 nodes"):
        Topology.make(4, 5)


def test_link_classes() -> None:
    kind = Topology.make(3, 2).link_class_DD()
    names = [[LINK_CLASSES[k] for k in row] for row in kind.tolist()]
    assert names == [["local", "intra", "inter"], ["intra", "local", "inter"], ["inter", "inter", "local"]]


def test_cost_by_hand() -> None:
    """Two nodes of two; rows of 10 bytes out (8 + 2 metadata) and 8 back."""
    rows = torch.tensor([[7, 2, 3, 0], [0, 0, 0, 0], [1, 0, 0, 0], [4, 0, 0, 0]])
    topology = Topology(devices=4, nodes=2, intra=100, inter=10, intra_latency=1, inter_latency=2)
    price = cost(rows, topology, Payload(hidden=4, itemsize=2, metadata=2), torch.tensor([1, 2, 3, 2]))
    local, intra, inter = (price.links[name] for name in LINK_CLASSES)
    assert (local.rows, intra.rows, inter.rows) == (7, 2, 8)
    assert (intra.bytes_out, intra.bytes_back) == (20, 16)
    assert (inter.bytes_out, inter.bytes_back) == (80, 64)
    assert (local.seconds_out, local.seconds_back) == (0, 0)
    assert intra.seconds_out == 1 + 20 / 100
    # Busiest uplink: device 0 receives 5 rows, then sends 5 back.
    assert inter.seconds_out == 2 + 50 / 10
    assert inter.seconds_back == 2 + 40 / 10
    assert price.seconds == 7 + 6
    assert price.bytes == 20 + 16 + 80 + 64
    assert price.busiest == "inter"
    assert price.max_over_mean == 1.5
    assert price.as_dict()["links"]["inter"]["rows"] == 8


def test_devices_that_share_an_uplink_wait_for_each_other() -> None:
    rows = torch.tensor([[0, 0, 3, 0], [0, 0, 0, 3], [0, 0, 0, 0], [0, 0, 0, 0]])
    own = Topology(devices=4, nodes=2, intra=100, inter=10)
    shared = own.model_copy(update={"uplink": "node"})
    assert port_seconds(rows, own)["inter"] == 0.3
    assert port_seconds(rows, shared)["inter"] == 0.6


def test_nothing_sent_costs_nothing() -> None:
    price = cost(torch.diag(torch.tensor([5, 6])), Topology.make(2, 2, latency=(1.0, 1.0)), Payload(hidden=4))
    assert (price.seconds, price.bytes) == (0.0, 0)


def test_fewer_rows_on_any_link_never_cost_more() -> None:
    chosen = torch.rand(500, 16, generator=torch.Generator().manual_seed(0)).topk(4).indices
    result = replay(chosen, torch.arange(16) // 4, 4, "round-robin", nodes=2)
    topology, payload = Topology.make(4, 2, "1GB/s,1GB/s"), Payload(hidden=64)
    per_expert = cost(result.expert_rows_DD, topology, payload)
    per_device = cost(result.device_rows_DD, topology, payload)
    per_node = cost(result.node_rows_DD, topology, payload)
    assert per_device.seconds < per_expert.seconds
    assert per_node.links["inter"].rows < per_device.links["inter"].rows < per_expert.links["inter"].rows


def test_rows_of_another_topology() -> None:
    with pytest.raises(BadConfig, match="do not fit"):
        cost(torch.zeros(2, 2, dtype=torch.int64), Topology.make(4), Payload(hidden=4))
