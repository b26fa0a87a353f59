"""Placements side by side on one trace: rows, what they spare, load, and how far from the bound.

Legend: E experts, D devices, K choices a token, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moekit._progress import Progress, track
from moekit.errors import BadConfig
from moekit.placement.objective import balanced_sizes
from moekit.placement.partitions import enumerable
from moekit.placement.plan import Placement
from moekit.placement.planning import place
from moekit.placement.result import expected_devices
from moekit.placement.simulation import experts_of, simulate, statistics_of

if TYPE_CHECKING:
    from moekit.trace.store import Trace

DEVICES = (2, 4, 8)


@dataclass(frozen=True)
class ComparisonRow:
    """One placement on one number of devices.

    Attributes:
        name: of the placement or solver.
        devices: D.
        rows: rows of the whole trace sent once per device, all layers.
        rows_per_token: the same per token and layer.
        rows_std: standard deviation of that over seeds, 0 for a single one.
        once_per_expert: rows per token and layer sent once per expert.
        expected_random: rows per token and layer under a random placement, the mean over all of them.
        remote_per_token: rows per token and layer that leave their home device (documents dealt out in turn).
        saved: share of the once-per-expert rows spared.
        saved_over_random: share of those rows spared; no random placement need be replayed for it.
        kept: share of the avoidable rows avoided; f for K = 2.
        imbalance: largest device load over the mean, averaged over layers.
        gap: how far below the bound the objective lies at most, averaged over layers; None without bound.
        proven: layers whose placement is a proven optimum.
        seeds: placements averaged.
    """

    name: str
    devices: int
    rows: float
    rows_per_token: float
    rows_std: float
    once_per_expert: float
    expected_random: float
    remote_per_token: float
    saved: float
    saved_over_random: float
    kept: float
    imbalance: float
    gap: float | None
    proven: int
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """Rows of the table, by devices and then in the order given.

    Attributes:
        rows: one per placement or solver and number of devices.
    """

    rows: list[ComparisonRow]

    def as_dicts(self) -> list[dict[str, Any]]:
        """As JSON holds it."""
        return [asdict(row) for row in self.rows]

    def table(self) -> str:
        """A Markdown table."""
        head = (
            "| D | placement | rows/token | saved vs once per expert | vs random | leave home | max/mean load | gap |"
        )
        lines = [head, "|" + "---|" * 8]
        for r in self.rows:
            spread = f" ± {r.rows_std:.4f}" if r.rows_std else ""
            gap = "" if r.gap is None else f"{r.gap:.4f}"
            saved = f"{r.saved:.1%} | {r.saved_over_random:.1%}"
            lines.append(
                f"| {r.devices} | {r.name} | {r.rows_per_token:.4f}{spread} | {saved} "
                f"| {r.remote_per_token:.4f} | {r.imbalance:.3f} | {gap} |"
            )
        return "\n".join(lines)


def _row(name: str, trace: Trace, placements: Sequence[Placement]) -> ComparisonRow:
    runs = [simulate(trace, placement) for placement in placements]
    first = placements[0]
    tokens, expert_rows = max(runs[0].total.tokens, 1), runs[0].total.rows_once_per_expert
    per_token = [run.total.rows_per_token for run in runs]
    mean = float(np.mean(per_token))
    gaps, random = first.gap, _random_rows(trace, first.devices)
    remote = float(np.mean([run.total.remote_per_device or 0 for run in runs]))
    return ComparisonRow(
        name=name,
        devices=first.devices,
        rows=float(np.mean([run.total.rows_once_per_device for run in runs])),
        rows_per_token=mean,
        rows_std=float(np.std(per_token, ddof=1)) if len(runs) > 1 else 0.0,
        once_per_expert=expert_rows / tokens,
        expected_random=random,
        remote_per_token=remote / tokens,
        saved=1 - mean * tokens / expert_rows if expert_rows else 0.0,
        saved_over_random=1 - mean / random if random else 0.0,
        kept=float(np.mean([run.total.kept for run in runs])),
        imbalance=float(np.mean([run.imbalance for run in runs])),
        gap=sum(gaps.values()) / len(gaps) if gaps else None,
        proven=len(first.proven),
        seeds=len(runs),
    )


def _random_rows(trace: Trace, devices: int) -> float:
    """Rows per token and layer under a random placement of equally many experts a device, the mean over all of them.

    What a token chose does not matter to it, only how many experts: any set of them is spread alike.
    """
    rows = tokens = 0.0
    for layer, experts in experts_of(trace).items():
        choices_N = (trace.indices(layer) < experts).sum(dim=1)
        for choices, count in enumerate(torch.bincount(choices_N).tolist()):
            rows += count * expected_devices(experts, devices, choices, balanced_sizes(experts, devices))
            tokens += count
    return rows / tokens if tokens else 0.0


def compare(trace: Trace, placements: Mapping[str, Placement | Sequence[Placement]]) -> Comparison:
    """Replay a trace under given placements.

    Args:
        trace: with choices kept.
        placements: name -> placement, or several (seeds) to average.

    Raises:
        BadConfig: no placement, or one of another model.
    """
    if not placements:
        raise BadConfig("there is nothing to compare", hint="give at least one placement")
    listed = {name: [p] if isinstance(p, Placement) else list(p) for name, p in placements.items()}
    rows = [_row(name, trace, runs) for name, runs in listed.items()]
    return Comparison(sorted(rows, key=lambda row: row.devices))


def default_solvers(experts: Iterable[int], devices: int) -> list[str]:
    """Solvers worth comparing; the exact one where all partitions can be listed."""
    names = ["contiguous", "random", "greedy", "swap"]
    return [*names, "exact"] if all(enumerable(balanced_sizes(count, devices)) for count in experts) else names


def compare_solvers(
    trace: Trace,
    devices: Sequence[int] = DEVICES,
    solvers: Sequence[str] | None = None,
    *,
    planned_on: Trace | None = None,
    seeds: int = 5,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Place by every solver on every number of devices, and replay.

    Args:
        trace: what is replayed.
        devices: numbers of devices; those above the number of experts are left out.
        solvers: catalogue names; default contiguous, random, greedy, swap, and exact where possible.
        planned_on: place by this trace instead, to see what a placement is worth on text it has not seen.
        seeds: random placements to average.
        seed: first seed.
        options: further options of `moekit.placement.planning`, such as `nodes` or `routing_groups`.
        progress: told once a placement.

    Raises:
        BadConfig: unknown solver, or no number of devices fits.
    """
    source = planned_on or trace
    fewest = min(source.meta.experts)
    jobs = [
        (count, name)
        for count in devices
        if count <= fewest
        for name in (solvers or default_solvers(source.meta.experts, count))
    ]
    if not jobs:
        raise BadConfig(f"{fewest} experts cannot be placed on {min(devices)} devices", hint="choose fewer devices")
    statistics = statistics_of(source)
    placed = {
        f"{name}@{count}": place_repeatedly(
            source, count, name, seeds=seeds, seed=seed, options=options, statistics=statistics
        )
        for count, name in track(jobs, "comparing placements", progress)
    }
    found = compare(trace, placed)
    return Comparison([ComparisonRow(**{**asdict(r), "name": r.name.split("@")[0]}) for r in found.rows])


def place_repeatedly(
    trace: Trace,
    devices: int,
    solver: str,
    *,
    seeds: int = 5,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> list[Placement]:
    """Place by a solver as `compare_solvers` does: several times where it draws numbers, else once.

    Args:
        trace: what is placed by.
        devices: D.
        solver: catalogue name.
        seeds: random placements.
        seed: first seed.
        options: further options of `moekit.placement.planning`, such as `nodes` or `routing_groups`.
        statistics: of the trace, from `statistics_of`; taken here by default.

    Raises:
        BadConfig: unknown solver, or an impossible number of devices.
    """
    known, digest = statistics or statistics_of(trace), trace.digest
    return [
        place(
            devices=devices,
            solver=solver,
            seed=seed + number,
            fingerprint=trace.meta.fingerprint,
            trace=digest,
            bound=solver not in {"contiguous", "random"},
            **known,
            **(options or {}),
        )
        for number in range(seeds if solver == "random" else 1)
    ]
