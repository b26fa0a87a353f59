"""Let everybody take turns in the same processes on the same nodes, and bring the numbers together.

Legend: R ranks.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moekit._progress import Progress
from moekit.bench.dispatch import workload
from moekit.bench.dispatch.checks import exactness, load_of, own_bytes, rows_of
from moekit.bench.dispatch.competitors.base import all_entries, peer_class
from moekit.bench.dispatch.crew import ANSWER_SECONDS, Crew, crew
from moekit.bench.dispatch.network import Network, name_rate, two_nodes
from moekit.bench.dispatch.result import BenchResult, Bytes, EntryResult, Timing, paired_ratio
from moekit.bench.dispatch.setting import BASELINE, Entry, Job
from moekit.bench.dispatch.workload import Workload
from moekit.errors import BadConfig

# Of a collective across nodes, where the link is only modelled: half a millisecond, and bytes over the rate.
ALPHA = 5e-4
# Rounds that are measured however long they take, and of entries so many times slower than the baseline.
FEW, SLOW = 5, 3.0

# Round -> seconds of forward, and of forward and backward.
Turns = dict[int, tuple[float, float]]


@dataclass(eq=False)
class Bench:
    """A crew at work.

    Attributes:
        work: what is computed.
        job: who takes part.
        team: the ranks.
        network: between them.
    """

    work: Workload
    job: Job
    team: Crew
    network: Network

    def check(self, number: int) -> dict[str, Any]:
        """Exactness, rows and bytes of one entry."""
        entry = self.job.entries[number]
        answers = self.team.ask("exact", number=number)
        sent = self.team.ask("bytes", number=number)
        shared = peer_class(entry.peer).shares_batch(entry.variant)
        return {
            "exactness": exactness(answers),
            "rows": rows_of(self.work, self.job, entry, answers),
            "load": load_of(self.work, self.job, entry),
            "shared_batch": shared,
            "forward": self._bytes(sent, answers, "forward"),
            "total": self._bytes(sent, answers, "total"),
        }

    def _bytes(self, sent: list[Any], answers: list[Any], name: str) -> Bytes:
        setting = self.job.setting
        nodes = range(setting.nodes)
        of_node = [range(n * setting.per_node, (n + 1) * setting.per_node) for n in nodes]
        parts = [answer[name] for answer in sent]
        known = not any(part["unknown"] for part in parts)
        return Bytes(
            sent=tuple(parts[ranks[0]]["sent"] for ranks in of_node) if self.network.shaped else None,
            counted=tuple(sum(parts[rank]["counted"] for rank in ranks) for ranks in of_node) if known else None,
            own=own_bytes(answers, setting, ("forward",) if name == "forward" else ("forward", "backward")),
            calls=max(part["calls"] for part in parts),
        )

    def time(self, rate: float | None, turns: Sequence[Sequence[int]], seed: int) -> dict[int, Turns]:
        """Seconds of forward and of both, the slowest rank's, by entry and round.

        Args:
            rate: of the link.
            turns: for each round, who takes part.
            seed: of the order inside a round.
        """
        self.network.shape(rate)
        answers = self.team.ask("time", seconds=ANSWER_SECONDS + 30 * len(turns), turns=turns, seed=seed)
        found: dict[int, Turns] = {}
        for parts in zip(*answers, strict=True):
            number, turn = parts[0][:2]
            found.setdefault(number, {})[turn] = (max(p[2] for p in parts), max(p[3] for p in parts))
        return found

    def plan(self, rates: Sequence[float | None], rounds: int, seconds: float | None) -> list[list[int]]:
        """Who takes part in each round, from one round at each rate, which warms up, too.

        An entry that is much slower than the baseline takes part in few rounds: they suffice to say so.

        Args:
            rates: all of them.
            rounds: wanted.
            seconds: that all rounds at all rates may take; None for as long as they take.
        """
        entries = range(len(self.job.entries))
        spent = dict.fromkeys(entries, 0.0)
        for rate in rates:
            for number, turns in self.time(rate, [list(entries)], self.work.setting.seed + 1).items():
                spent[number] += turns[0][1]
        base = self.job.entries.index(BASELINE) if BASELINE in self.job.entries else None
        slow = {n for n in entries if base is not None and spent[n] > SLOW * spent[base]}
        if seconds is not None:
            seconds -= FEW * sum(spent[n] for n in slow)
            possible = int(seconds / sum(spent[n] for n in entries if n not in slow))
            rounds = min(rounds, max(FEW, possible))
        return [[n for n in entries if n not in slow or turn < FEW] for turn in range(rounds)]


@contextmanager
def start(
    work: Workload,
    entries: Sequence[Entry],
    layouts: Mapping[str, Mapping[int, Sequence[int]]],
    shaped: bool | None,
) -> Iterator[Bench]:
    """Network and ranks for these entries, all of which can take part."""
    job = Job(
        setting=work.setting,
        layers=work.layers,
        entries=tuple(entries),
        layouts={name: {n: list(owner) for n, owner in by_layer.items()} for name, by_layer in layouts.items()},
    )
    with tempfile.TemporaryDirectory(prefix="moekit-bench-") as scratch:
        folder = Path(scratch)
        workload.write(work, folder)
        (folder / workload.JOB).write_text(job.model_dump_json())
        with two_nodes(shaped=shaped) as network, crew(job, folder, network) as team:
            yield Bench(work, job, team, network)


def run_bench(
    work: Workload,
    *,
    entries: Sequence[Entry] | None = None,
    layouts: Mapping[str, Mapping[int, Sequence[int]]] | None = None,
    rates: Sequence[float | None] = (2e8, 1e9, None),
    rounds: int = 20,
    minutes: float | None = None,
    shaped: bool | None = None,
    source: str = "one made-up layer",
    progress: Progress | None = None,
) -> BenchResult:
    """Measure every entry: exactness, rows, bytes, and time at each rate.

    Args:
        work: weights, tokens and choices.
        entries: who takes part; everybody by default.
        layouts: placement's name -> layer -> rank of each expert.
        rates: bits a second between nodes, None unshaped.
        rounds: of each rate; ratios want 20 or more.
        minutes: take fewer rounds where these would be exceeded, and say so.
        shaped: use network namespaces; None where they can be made.
        source: where weights and choices come from.
        progress: told of every entry and rate.

    Raises:
        BadConfig: nobody can take part, or namespaces are asked for and cannot be made.
        PeerLost: a rank failed.
    """
    layouts = layouts or {}
    wanted = tuple(entries) if entries is not None else all_entries(list(layouts), list(work.choices))
    reasons = {entry: peer_class(entry.peer).why_not(work.setting, entry) for entry in wanted}
    taking = [entry for entry in wanted if reasons[entry] is None]
    if not taking:
        raise BadConfig("nobody can take part", hint="; ".join(f"{e.name}: {r}" for e, r in reasons.items()))
    begun = time.monotonic()
    with start(work, taking, layouts, shaped) as bench:
        if progress is not None:
            progress.start("bench", len(taking) + len(rates))
        checks = {}
        for number, entry in enumerate(taking):
            checks[entry] = bench.check(number)
            if progress is not None:
                progress.advance(note=entry.name)
        left = None if minutes is None else minutes * 60 - (time.monotonic() - begun)
        turns = bench.plan(rates, rounds, left)
        times: dict[float | None, dict[int, Turns]] = {}
        for rate in rates:
            times[rate] = bench.time(rate, turns, work.setting.seed)
            if progress is not None:
                progress.advance(note=name_rate(rate))
        if progress is not None:
            progress.finish()
        network = bench.network
    found = []
    for entry in wanted:
        if reasons[entry] is not None:
            found.append(EntryResult(entry=entry, skipped=reasons[entry] or ""))
            continue
        timings = tuple(_timing(entry, taking, checks, times[rate], rate, network.shaped) for rate in rates)
        found.append(EntryResult(entry=entry, timings=timings, **checks[entry]))
    return BenchResult(
        setting=work.setting,
        source=source,
        layers=work.layers,
        shaped=network.shaped,
        reason=network.reason,
        rates=tuple(rates),
        rounds=len(turns),
        entries=tuple(found),
        machine=describe_machine(),
        notes=_notes(found, network, len(turns), rounds),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - begun,
    )


def _timing(
    entry: Entry,
    taking: list[Entry],
    checks: dict[Entry, Any],
    times: dict[int, Turns],
    rate: float | None,
    shaped: bool,
) -> Timing:
    model = rate is not None and not shaped

    def rounds(of: Entry, place: int, among: Turns) -> tuple[float, ...]:
        sent: Bytes = checks[of]["total" if place else "forward"]
        extra = 0.0
        if model and sent.counted is not None:
            assert rate is not None
            extra = sent.calls * ALPHA + max(sent.counted) * 8 / rate
        turns = times[taking.index(of)]
        return tuple((turns[number][place] + extra) * 1e3 for number in sorted(among))

    own = times[taking.index(entry)]
    ratios = {}
    if BASELINE in taking and entry != BASELINE:
        seed = taking.index(entry)
        ratios = {
            name: paired_ratio(rounds(entry, place, own), rounds(BASELINE, place, own), seed)
            for place, name in enumerate(("forward_ratio", "total_ratio"))
        }
    return Timing(rate=rate, modelled=model, forward=rounds(entry, 0, own), total=rounds(entry, 1, own), **ratios)


def _notes(found: Sequence[EntryResult], network: Network, taken: int, asked: int) -> tuple[str, ...]:
    notes = []
    if taken < asked:
        notes.append(f"For lack of time {taken} rounds were measured at each rate, not {asked}.")
    few = [entry.name for entry in found if entry.timings and len(entry.timings[0].total) < taken]
    if few:
        notes.append(f"Much slower than the baseline, so in {FEW} rounds only: {', '.join(few)}.")
    if not network.shaped:
        notes.append(
            f"The link is modelled ({network.reason}): {ALPHA * 1e3:g} ms for each collective and the counted bytes "
            "over the rate were added to times on the loopback."
        )
    wrong = [entry.name for entry in found if entry.rows is not None and not entry.rows.alike]
    if wrong:
        notes.append(f"Rows are not those of the replay: {', '.join(wrong)}.")
    return tuple(notes)


def describe_machine() -> dict[str, str]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    found = {
        "processor": model,
        "cores": str(os.cpu_count()),
        "system": platform.platform(terse=True),
        "torch": torch.__version__,
    }
    for name in ("transformers", "deepspeed"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
