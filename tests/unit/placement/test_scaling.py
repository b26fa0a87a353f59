"""Predicted steps: one worked by hand, what must hold for any, and links fitted to measurements."""

from __future__ import annotations

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.placement.fitting import calibrated, fit_line, fit_link
from moekit.placement.planning import place
from moekit.placement.replaying import replay
from moekit.placement.scaling import Workload, predict_scaling, predict_step
from moekit.placement.topology import Topology
from tests.unit.placement.samples import skewed_choices, trace_of

# Two ranks in two nodes, one expert each, two tokens a rank: expert 0 is chosen once, expert 1 three times.
TINY = trace_of({0: torch.tensor([[0], [1], [1], [1]])}, 2)
LINKS = Topology(devices=2, nodes=2, intra=100, inter=10, inter_latency=1)
WORK = Workload(
    tokens_per_rank=2,
    expert_seconds=1,
    dense_seconds=2,
    shared_seconds=1,
    layer_seconds=0.5,
    overlap=0.5,
    itemsize=4,
)


def test_by_hand() -> None:
    """One row of 32 + 4 + 1 bytes, padded to 40, goes out, 32 come back; 32 and 36 in backward; counts are 8 bytes."""
    (step,) = predict_step(TINY, LINKS, WORK, dispatches=["once-per-rank"])
    assert step.compute == 3 * (2 * 2 + 0.5 + 2 * 1)
    assert step.experts == 3 * 3
    assert step.waiting == 3 * (3 - 2)
    assert step.exchange == pytest.approx(1.8 + 5 + 4.2 + 4.2 + 4.6)
    assert step.hidden == 0.5 * 2
    assert step.seconds == pytest.approx(3 * 6.5 + 3 * 3 + 19.8 - 1)
    assert (step.rows, step.bytes_intra, step.bytes_inter) == (1, 0, 40 + 32 + 32 + 36)
    assert step.max_over_mean == 1.5
    assert step.tokens == 4
    assert step.exposed == pytest.approx(18.8 / 47.3)
    assert step.tokens_per_second == pytest.approx(4 / 47.3)
    assert step.as_dict()["exposed"] == step.exposed


def test_inference_by_hand() -> None:
    (step,) = predict_step(TINY, LINKS, WORK.model_copy(update={"backward": 0}), dispatches=["once-per-rank"])
    assert step.seconds == pytest.approx(6.5 + 3 + 1.8 + 5 + 4.2 - 1)
    assert step.bytes_inter == 40 + 32


def test_all_gather_by_hand() -> None:
    """Both tokens of both ranks cross: 40 bytes each out, 32 back; in backward 32, and 8 + 1 numbers of 4 bytes."""
    (step,) = predict_step(TINY, LINKS, WORK, dispatches=["all-gather"])
    assert step.rows == 4
    assert step.bytes_inter == 4 * (40 + 32 + 32 + 36)
    assert step.exchange == pytest.approx(1.8 + (1 + 8) + (1 + 6.4) * 2 + (1 + 7.2))


def test_rows_hide_behind_shared_experts_at_most_as_long_as_they_take() -> None:
    slow = WORK.model_copy(update={"shared_seconds": 100, "overlap": 1})
    (step,) = predict_step(TINY, LINKS, slow, dispatches=["once-per-rank"])
    assert step.hidden == 5


def test_layers_and_steps() -> None:
    """Two equal layers take twice as long; a trace of two equal halves has equal steps."""
    choices = torch.cat([TINY.indices(0)] * 2)
    (single,) = predict_step(TINY, LINKS, WORK, dispatches=["once-per-rank"])
    (double,) = predict_step(trace_of({0: choices, 1: choices}, 2), LINKS, WORK, dispatches=["once-per-rank"], steps=2)
    assert double.seconds == pytest.approx(2 * single.seconds)
    assert double.max_over_mean == single.max_over_mean
    assert double.bytes_inter == 2 * single.bytes_inter


def test_a_short_trace_begins_anew() -> None:
    (step,) = predict_step(TINY, LINKS, WORK.model_copy(update={"tokens_per_rank": 4}), dispatches=["once-per-expert"])
    # Both ranks hold all four tokens: one row from rank 1 to 0, three from 0 to 1.
    assert step.rows == 4


def test_rows_are_the_replays_and_hierarchical_crosses_least() -> None:
    chosen = skewed_choices(64 * 16, 64, 8)
    trace = trace_of({0: chosen}, 64)
    # With as few as 8 numbers a row the ids and weights would weigh more than the rows that are spared.
    trace.meta = trace.meta.model_copy(update={"hidden": 512})
    topology = Topology.make(16, 4, "100GB/s,10GB/s")
    steps = {s.dispatch: s for s in predict_step(trace, topology, Workload(tokens_per_rank=64))}
    homes, owner = torch.arange(64 * 16) // 64, torch.arange(64) // 4
    result = replay(chosen, owner, 16, homes, nodes=4)
    assert steps["once-per-expert"].rows == result.remote_per_expert
    assert steps["once-per-rank"].rows == result.remote_per_device
    assert steps["hierarchical"].bytes_inter < steps["once-per-rank"].bytes_inter < steps["once-per-expert"].bytes_inter
    assert steps["all-gather"].rows == 64 * 16 * 15
    assert {s.max_over_mean for s in steps.values()} == {result.max_over_mean}


def test_scaling() -> None:
    trace = trace_of({0: skewed_choices(500, 32, 4)}, 32)
    work = Workload(tokens_per_rank=32, expert_seconds=1e-6)
    steps = predict_scaling(
        trace, Topology(devices=1), work, ranks=(4, 8, 32), per_node=8, dispatches=["once-per-rank"]
    )
    assert [(s.ranks, s.nodes) for s in steps] == [(4, 1), (8, 1), (32, 4)]
    assert steps[0].bytes_inter == steps[1].bytes_inter == 0 < steps[2].bytes_inter
    assert steps[0].max_over_mean < steps[2].max_over_mean
    placed = predict_scaling(
        trace,
        Topology(devices=1),
        work,
        ranks=(8,),
        dispatches=["once-per-rank"],
        place=lambda devices, nodes: place({0: torch.zeros(32, 32)}, devices, solver="random", nodes=nodes),
    )
    assert placed[0].rows != steps[1].rows


def test_a_thousand_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    trace = trace_of({0: torch.randint(0, 255, (4096, 1), generator=g)}, 255)
    with pytest.raises(BadConfig, match="255 experts, too few for 1024 ranks") as caught:
        predict_scaling(trace, Topology(devices=1), Workload(), ranks=(8, 1024))
    assert "at most 255" in str(caught.value)
    # Traces keep choices of more than 255 experts in two bytes.
    wide = trace_of({0: torch.zeros(1, 1, dtype=torch.int64)}, 255)
    wide._indices[0] = torch.randint(0, 1024, (4096, 8), generator=g).short()
    wide.meta = wide.meta.model_copy(update={"experts": [1024], "top_k": [8], "tokens": 4096})
    (step,) = predict_step(wide, Topology.make(1024, 128), Workload(tokens_per_rank=4), dispatches=["hierarchical"])
    assert step.tokens == 4096
    assert step.rows > 4096


def test_refusals() -> None:
    placed = place({0: torch.zeros(2, 2)}, 1, solver="contiguous")
    with pytest.raises(BadConfig, match="does not fit 2 ranks"):
        predict_step(TINY, LINKS, WORK, placement=placed)
    with pytest.raises(BadData, match="no token"):
        predict_step(trace_of({0: torch.zeros(0, 1, dtype=torch.int64)}, 2), LINKS, WORK)


def test_link_of_exact_measurements() -> None:
    fit = fit_link([(size, 0.002 + size / 5e6) for size in (1, 1000, 10**6, 10**7)])
    assert fit.alpha == pytest.approx(0.002)
    assert fit.bandwidth == pytest.approx(5e6)
    assert fit.worst == pytest.approx(0, abs=1e-12)
    assert fit.seconds(5e6) == pytest.approx(1.002)
    topology = calibrated(Topology.make(4, 2, "1GB/s"), inter=fit)
    assert (topology.intra, topology.intra_latency) == (1e9, 0)
    assert (topology.inter, topology.inter_latency) == pytest.approx((5e6, 0.002))


def test_relative_least_squares_by_hand() -> None:
    """Sizes 0, 1, 2 in 1, 1 and 2 seconds: minimise (a-1)^2 + (a+b-1)^2 + ((a+2b-2)/2)^2.

    Setting both derivatives to 0: 2.25 a + 1.5 b = 2.5 and 1.5 a + 2 b = 2, so a = 8/9 and b = 1/3.
    """
    fit = fit_line([(0, 1), (1, 1), (2, 2)])
    assert (fit.offset, fit.slope) == pytest.approx((8 / 9, 1 / 3))
    assert fit.errors == pytest.approx((-1 / 9, 2 / 9, -2 / 9))
    assert fit.worst == pytest.approx(2 / 9)
    assert fit.mean == pytest.approx(5 / 27)


def test_no_latency_below_zero() -> None:
    """1 and 4 seconds for sizes 1 and 2 would begin before 0: through the origin, (1 + 8/16) / (1 + 4/16) = 1.2."""
    fit = fit_line([(1, 1), (2, 4)])
    assert fit.offset == 0
    assert fit.slope == pytest.approx(1.2)


@pytest.mark.parametrize(
    "samples", [[], [(1, 1)], [(5, 1), (5, 2)], [(1, 2), (9, 1)], [(1, 0.0), (2, 1)], [(-1, 1), (2, 1)]]
)
def test_no_fit(samples: list[tuple[float, float]]) -> None:
    with pytest.raises(BadData):
        fit_link(samples)
