"""Step time of expert parallelism on machines one does not have: 8 to 1024 ranks, from a trace and a topology.

Rows and load are exact: tokens of the trace are dealt to the ranks in order and replayed. Time is modelled, layer by
layer, as every rank waits for the slowest at each exchange:

    forward   dense + shared + slowest rank's experts + counts + dispatch + combine - what shared experts hide
    backward  `backward` times the compute, and both exchanges the other way round

- an exchange takes alpha + bytes / bandwidth on the busiest port; links inside nodes and across work at the same time,
  except that a hierarchical exchange uses one after the other;
- counts (8 bytes for each rank) go ahead of the rows and are not hidden;
- shared experts are computed while rows travel out, forward only: backward exchanges are waited for.

Not modelled: contention inside the network, ranks of different speed, memory, overlap between layers.

Legend: N tokens of the trace, B tokens a rank, K choices, H hidden size, D ranks, M nodes, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from moekit._progress import Progress, track
from moekit.errors import BadConfig, BadData
from moekit.placement.exchanges import DISPATCHES, JOURNEYS, Dispatch, Exchange, exchange_of
from moekit.placement.objective import balanced_sizes
from moekit.placement.plan import Placement
from moekit.placement.replaying import replay
from moekit.placement.result import ReplayResult
from moekit.placement.sending import Held, RowFormat
from moekit.placement.topology import Topology

if TYPE_CHECKING:
    from moekit.trace.store import Trace

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


class Workload(BaseModel):
    """What a rank computes in a step, and how long it takes; measured on one device.

    Attributes:
        tokens_per_rank: B.
        expert_seconds: one choice through one expert, forward.
        dense_seconds: one token through one layer's attention, norms and router, forward.
        shared_seconds: one token through one layer's shared experts, forward.
        layer_seconds: what a layer costs however few its tokens, forward.
        overlap: share of the shared experts' time during which rows travel; 1: all of it, 0: none.
        backward: backward compute over forward; 0 for inference.
        itemsize: bytes of a hidden state's number.
        weight_itemsize: bytes of a router weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_per_rank: int = Field(default=2048, ge=1)
    expert_seconds: float = Field(default=0.0, ge=0)
    dense_seconds: float = Field(default=0.0, ge=0)
    shared_seconds: float = Field(default=0.0, ge=0)
    layer_seconds: float = Field(default=0.0, ge=0)
    overlap: float = Field(default=1.0, ge=0, le=1)
    backward: float = Field(default=2.0, ge=0)
    itemsize: int = Field(default=2, ge=1)
    weight_itemsize: int = Field(default=4, ge=1)


@dataclass(frozen=True)
class StepTime:
    """One step of all layers, forward and (unless for inference) backward; the mean over the steps looked at.

    Attributes:
        dispatch: name of the dispatcher.
        ranks: D.
        nodes: M.
        seconds: of the step.
        compute: dense layers, shared experts and what every layer costs.
        experts: experts of the slowest rank of each layer.
        waiting: of these, what the slowest takes longer than the mean rank.
        exchange: counts and rows, hidden or not.
        hidden: exchange behind shared experts.
        rows: rows that leave their rank on the way out, forward.
        bytes_intra: bytes inside nodes, both ways and both passes.
        bytes_inter: bytes across nodes.
        max_over_mean: largest load of a rank over the mean, averaged over layers.
        tokens: of all ranks.
    """

    dispatch: str
    ranks: int
    nodes: int
    seconds: float
    compute: float
    experts: float
    waiting: float
    exchange: float
    hidden: float
    rows: float
    bytes_intra: float
    bytes_inter: float
    max_over_mean: float
    tokens: int

    @property
    def exposed(self) -> float:
        """Share of the step spent on exchanges that nothing hides."""
        return (self.exchange - self.hidden) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds if self.seconds else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "exposed": self.exposed}


def _layer(name: Dispatch, result: ReplayResult, exchange: Exchange, topology: Topology, work: Workload) -> StepTime:
    tokens = work.tokens_per_rank
    shared = tokens * work.shared_seconds
    dense = tokens * work.dense_seconds + work.layer_seconds
    load_D = result.load_D.double() * work.expert_seconds
    slowest, mean = float(load_D.max()), float(load_D.mean())
    out = exchange.seconds("dispatch", topology)
    hidden = min(out, work.overlap * shared)
    journeys = JOURNEYS if work.backward else JOURNEYS[:2]
    travel = exchange.count_seconds(topology) + sum(exchange.seconds(journey, topology) for journey in journeys)
    passes = 1 + work.backward
    return StepTime(
        dispatch=name,
        ranks=topology.devices,
        nodes=topology.nodes,
        seconds=passes * (dense + shared + slowest) + travel - hidden,
        compute=passes * (dense + shared),
        experts=passes * slowest,
        waiting=passes * (slowest - mean),
        exchange=travel,
        hidden=hidden,
        rows=exchange.rows["intra"] + exchange.rows["inter"],
        bytes_intra=exchange.nbytes("intra", journeys),
        bytes_inter=exchange.nbytes("inter", journeys),
        max_over_mean=result.max_over_mean,
        tokens=tokens * topology.devices,
    )


def _merged(parts: Sequence[StepTime], layers: int) -> StepTime:
    """Sum over layers, mean over steps."""
    steps = len(parts) // layers
    values: dict[str, Any] = {}
    for field in fields(StepTime):
        first = getattr(parts[0], field.name)
        if field.name in {"dispatch", "ranks", "nodes", "tokens"}:
            values[field.name] = first
            continue
        total = sum(getattr(part, field.name) for part in parts)
        values[field.name] = total / len(parts) if field.name == "max_over_mean" else total / steps
    return StepTime(**values)


def check_ranks(trace: Trace, ranks: int) -> None:
    """Refuse more ranks than experts.

    Raises:
        BadConfig: some layer of the trace has fewer experts than there are ranks.
    """
    fewest = min(trace.meta.experts)
    if ranks > fewest:
        raise BadConfig(
            f"the trace is of {fewest} experts, too few for {ranks} ranks: expert parallelism gives every rank one",
            hint=f"choose at most {fewest} ranks; further ranks are for data parallelism, as groups of so many",
        )


def predict_step(
    trace: Trace,
    topology: Topology,
    workload: Workload,
    *,
    dispatches: Sequence[Dispatch] = DISPATCHES,
    placement: Placement | None = None,
    steps: int = 1,
) -> list[StepTime]:
    """Predict the time of a step on a topology, for each dispatcher.

    Rank r of step s gets the tokens (s * D + r) * B onwards; where the trace is shorter it begins anew.

    Args:
        trace: with choices kept.
        topology: ranks, nodes, links.
        workload: what a rank computes.
        dispatches: dispatchers.
        placement: for this model and these ranks; experts in contiguous blocks by default.
        steps: steps to look at.

    Raises:
        BadConfig: more ranks than experts, or a placement for another number of ranks.
        BadData: a trace without tokens or choices.
    """
    check_ranks(trace, topology.devices)
    if placement is not None and placement.devices != topology.devices:
        raise BadConfig(f"a placement on {placement.devices} devices does not fit {topology.devices} ranks")
    if not trace.meta.tokens:
        raise BadData("the trace holds no token", hint="record one on more text")
    ranks, tokens = topology.devices, workload.tokens_per_rank
    home_N = torch.arange(ranks * tokens) // tokens
    form = RowFormat(trace.meta.hidden, workload.itemsize, workload.weight_itemsize)
    found: dict[Dispatch, list[StepTime]] = {name: [] for name in dispatches}
    for layer in trace.meta.layers:
        holders = _holders(trace.meta.experts_of(layer), ranks) if placement is None else placement.holders(layer)
        held = Held.of(holders, ranks, topology.nodes, trace.meta.top_k_of(layer))
        for step in range(steps):
            position_N = (torch.arange(ranks * tokens) + step * ranks * tokens) % trace.meta.tokens
            chosen_NK = trace.indices(layer)[position_N]
            result = replay(chosen_NK, holders, ranks, home_N, nodes=topology.nodes)
            for name in dispatches:
                exchange = exchange_of(name, result, topology, held, form, tokens)
                found[name].append(_layer(name, result, exchange, topology, workload))
    return [_merged(parts, len(trace.meta.layers)) for parts in found.values()]


def _holders(experts: int, ranks: int) -> list[list[int]]:
    sizes = balanced_sizes(experts, ranks)
    return [[rank] for rank, size in enumerate(sizes) for _ in range(size)]


def predict_scaling(
    trace: Trace,
    topology: Topology,
    workload: Workload,
    *,
    ranks: Sequence[int] = RANKS,
    per_node: int = 8,
    dispatches: Sequence[Dispatch] = DISPATCHES,
    place: Callable[[int, int], Placement] | None = None,
    steps: int = 1,
    progress: Progress | None = None,
) -> list[StepTime]:
    """Predict steps on more and more ranks, each with B tokens (weak scaling).

    Args:
        trace: with choices kept.
        topology: whose links every size has; its devices and nodes are left aside.
        workload: what a rank computes.
        ranks: sizes.
        per_node: ranks of a node.
        dispatches: dispatchers.
        place: makes a placement from a number of devices and nodes; contiguous by default.
        steps: steps to look at.
        progress: told once a size.

    Raises:
        BadConfig: more ranks than experts, whatever the other sizes.
    """
    check_ranks(trace, max(ranks))
    found: list[StepTime] = []
    for count in track(ranks, "predicting steps", progress, len(ranks)):
        nodes = -(-count // per_node)
        sized = topology.model_copy(update={"devices": count, "nodes": nodes})
        placement = None if place is None else place(count, nodes)
        found += predict_step(trace, sized, workload, dispatches=dispatches, placement=placement, steps=steps)
    return found
