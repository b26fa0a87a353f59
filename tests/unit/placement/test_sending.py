"""Bytes and seconds of the ways to send, by hand and as the runtime packs its rows."""

from __future__ import annotations

import pytest
import torch

from moekit.errors import BadConfig
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.plan import once_per_expert, once_per_rank
from moekit.parallel.wire import RowFormat as WireFormat
from moekit.placement.plan import Placement
from moekit.placement.sending import Held, RowFormat, predict_sending, row_metadata
from moekit.placement.topology import Topology, parse_latency
from tests.unit.placement.samples import skewed_choices, trace_of

# As in test_replaying: experts 0,1 | 2,3 | 4,5 | 6,7; 8 is no expert; 8 numbers a row.
TOKENS = torch.tensor([[0, 1, 2], [4, 5, 8], [8, 8, 8], [0, 7, 6]])
HOMES = torch.tensor([0, 3, 1, 1])
PLACED = Placement(
    devices=4, nodes=2, experts=8, layers={0: [0, 0, 1, 1, 2, 2, 3, 3]}, solver="contiguous", fingerprint="model-a"
)
LINKS = Topology(devices=4, nodes=2, intra=100, inter=10, intra_latency=1, inter_latency=2)


@pytest.mark.parametrize("hidden", [7, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slots", "most"), [(1, 2), (3, 255), (8, 256)])
@pytest.mark.parametrize("ids", [True, False])
def test_rows_weigh_what_the_runtime_packs(
    hidden: int, dtype: torch.dtype, weight: torch.dtype, slots: int, most: int, ids: bool
) -> None:
    packed = WireFormat(hidden=hidden, dtype=dtype, slots=slots, weight_dtype=weight, ids=ids, most=most).nbytes
    form = RowFormat(hidden, dtype.itemsize, weight.itemsize)
    assert form.payload(slots, most, ids=ids).out == packed
    extra = row_metadata(hidden, dtype.itemsize, slots, most, weight.itemsize, ids)
    assert extra == packed - hidden * dtype.itemsize


def test_by_hand() -> None:
    """16 bytes of hidden state; a slot adds 5, in words of 4: 24 for one slot, 28 for two, 32 for three."""
    found = predict_sending(trace_of({0: TOKENS}, 8), PLACED, LINKS, home=HOMES)
    links = {name: (price.links["intra"], price.links["inter"]) for name, price in found.costs.items()}
    rows = {name: (intra.rows, inter.rows) for name, (intra, inter) in links.items()}
    assert rows == {"once per expert": (4, 2), "once per device": (3, 1), "hierarchical": (3, 1)}
    out = {name: (intra.bytes_out, inter.bytes_out) for name, (intra, inter) in links.items()}
    assert out == {"once per expert": (96, 48), "once per device": (84, 28), "hierarchical": (84, 32)}
    back = {name: (intra.bytes_back, inter.bytes_back) for name, (intra, inter) in links.items()}
    assert back == {"once per expert": (64, 32), "once per device": (48, 16), "hierarchical": (48, 16)}
    per_expert, hierarchical = found.costs["once per expert"], found.costs["hierarchical"]
    # Two rows of 24 through the busiest port of either kind; the slower link decides.
    assert (per_expert.links["intra"].seconds_out, per_expert.links["inter"].seconds_out) == (1.48, 6.8)
    assert (per_expert.seconds_out, per_expert.seconds_back) == (6.8, 5.2)
    # First across (2 + 32 / 10), then inside (1 + 28 / 100).
    assert hierarchical.seconds_out == pytest.approx(5.2 + 1.28)
    assert hierarchical.seconds_back == pytest.approx(3.6 + 1.16)
    told = found.as_dict()
    assert told["load"] == [3, 1, 2, 2]
    assert told["imbalance"] == 1.5
    assert told["sending"]["once per expert"]["bytes_per_token"] == (96 + 48 + 64 + 32) / 4


def test_layers_add_up() -> None:
    one = predict_sending(trace_of({0: TOKENS}, 8), PLACED, LINKS, home=HOMES)
    placed = PLACED.model_copy(update={"layers": {0: PLACED.layers[0], 5: PLACED.layers[0]}})
    two = predict_sending(trace_of({0: TOKENS, 5: TOKENS}, 8), placed, LINKS, home=HOMES)
    for name, price in one.costs.items():
        assert two.costs[name].seconds == pytest.approx(2 * price.seconds)
        assert two.costs[name].bytes == 2 * price.bytes
        assert two.costs[name].load == [2 * n for n in price.load]


@pytest.mark.parametrize("name", ["once per expert", "once per device"])
def test_bytes_are_those_of_the_runtimes_plans(name: str) -> None:
    """Plans of all ranks, made without any process, put as many bytes on the links."""
    chosen, homes = skewed_choices(300, 12, 3), torch.arange(300) % 4
    owner = [0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 1, 2]
    placed = Placement(devices=4, nodes=2, experts=12, layers={0: owner}, solver="x", fingerprint="model-a")
    price = predict_sending(trace_of({0: chosen}, 12), placed, Topology.make(4, 2), home=homes).costs[name]
    layout = ExpertLayout.make(owner, 4)
    sent = {"intra": 0, "inter": 0}
    for rank in range(4):
        plan = (once_per_expert if name == "once per expert" else once_per_rank)(chosen[homes == rank], layout)
        row = WireFormat(hidden=8, dtype=torch.bfloat16, slots=plan.slots, ids=True, most=plan.none)
        for target, rows in enumerate(plan.counts_R.tolist()):
            if target != rank:
                sent["intra" if target // 2 == rank // 2 else "inter"] += rows * row.nbytes
    assert sent == {"intra": price.links["intra"].bytes_out, "inter": price.links["inter"].bytes_out}


def test_copies_count_as_held() -> None:
    """Device 0 holds experts 0, 1 and 2, and node 0 the same three and 3."""
    held = Held.of([[0], [0], [1, 0], [1], [2], [2], [3], [3, 2]], 4, 2, 3)
    assert (held.device, held.node) == (3, 4)


def test_latencies() -> None:
    assert parse_latency(None) == (0, 0)
    assert parse_latency("3us, 10us") == pytest.approx((3e-6, 1e-5))
    assert parse_latency("0.5ms") == pytest.approx((5e-4, 5e-4))
    for text in ("3", "fast", "1us,2us,3us", "-1us", ""):
        with pytest.raises(BadConfig, match="no latency"):
            parse_latency(text)


def test_refusals() -> None:
    trace = trace_of({0: TOKENS}, 8)
    with pytest.raises(BadConfig, match="does not fit a topology of 4 in 1"):
        predict_sending(trace, PLACED, Topology.make(4, 1))
    with pytest.raises(BadConfig, match="without homes"):
        predict_sending(trace, PLACED, LINKS, home=None)
