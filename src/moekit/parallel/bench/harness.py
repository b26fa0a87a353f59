"""Start the ranks on their nodes, let everybody take turns in the same processes, and bring the numbers together.

Legend: R ranks.
"""

from __future__ import annotations

import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moekit._progress import Progress
from moekit.errors import BadConfig, PeerLost
from moekit.parallel.bench import workload
from moekit.parallel.bench.checks import exactness, load_of, own_bytes, rows_of
from moekit.parallel.bench.network import Network, name_rate, two_nodes
from moekit.parallel.bench.peers.base import all_entries, peer_class
from moekit.parallel.bench.result import BenchResult, Bytes, EntryResult, Timing, paired_ratio
from moekit.parallel.bench.setting import BASELINE, Entry, Job
from moekit.parallel.bench.workload import Workload

START_SECONDS = 180.0
ANSWER_SECONDS = 300.0
# Of a collective across nodes, where the link is only modelled: half a millisecond, and bytes over the rate.
ALPHA = 5e-4


@dataclass(eq=False)
class Crew:
    """The ranks, waiting for orders."""

    processes: list[subprocess.Popen[str]]
    answers: list[Any]
    logs: list[Path]

    def ask(self, what: str, seconds: float = ANSWER_SECONDS, **options: Any) -> list[Any]:
        """Let all ranks do something; their answers in rank order.

        Raises:
            PeerLost: a rank failed, died or does not answer.
        """
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"do": what, **options}) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                continue  # its answer, or the lack of one, says why
        return self.collect(seconds)

    def collect(self, seconds: float) -> list[Any]:
        """One answer of each rank."""
        until = time.monotonic() + seconds
        return [self._answer(rank, until) for rank in range(len(self.processes))]

    def _answer(self, rank: int, until: float) -> Any:
        ready, _, _ = select.select([self.answers[rank]], [], [], max(0.0, until - time.monotonic()))
        line = self.answers[rank].readline() if ready else ""
        if line:
            answer = json.loads(line)
            if "ok" in answer:
                return answer["ok"]
            raise PeerLost(f"rank {rank} of the bench failed: {answer['error'].strip()}")
        what = "ended without an answer" if ready else "does not answer in time"
        raise PeerLost(f"rank {rank} of the bench {what}", hint=_tail(self.logs[rank]))


def _tail(log: Path, lines: int = 8) -> str:
    text = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return "; ".join(text[-lines:]) or "it said nothing"


@contextmanager
def crew(job: Job, folder: Path, network: Network) -> Iterator[Crew]:
    """Ranks that have read a job; they are gone afterwards."""
    processes: list[subprocess.Popen[str]] = []
    answers: list[Any] = []
    logs = [folder / f"rank{rank}.log" for rank in range(job.setting.ranks)]
    try:
        for rank in range(job.setting.ranks):
            node = rank // job.setting.per_node
            read, write = os.pipe()
            answers.append(os.fdopen(read))
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [
                            *network.prefix(node),
                            sys.executable,
                            "-m",
                            __package__ + ".workers",
                            str(folder),
                            str(write),
                        ],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                        pass_fds=(write,),
                        env=_environment(job, rank, network),
                    )
                )
            os.close(write)
        team = Crew(processes, answers, logs)
        team.collect(START_SECONDS)
        yield team
        for process in processes:
            assert process.stdin is not None
            process.stdin.write('{"do": "quit"}\n')
            process.stdin.flush()
        for process in processes:
            process.wait(20)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _end(processes, answers)


def _end(processes: Sequence[subprocess.Popen[str]], answers: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
    for pipe in answers:
        pipe.close()


def _environment(job: Job, rank: int, network: Network) -> dict[str, str]:
    node = rank // job.setting.per_node
    return {
        **os.environ,
        **network.environment(node),
        "RANK": str(rank),
        "WORLD_SIZE": str(job.setting.ranks),
        "LOCAL_RANK": str(rank % job.setting.per_node),
        "LOCAL_WORLD_SIZE": str(job.setting.per_node),
        "OMP_NUM_THREADS": "1",
        "MOEKIT_BENCH_DEVICE": network.device(node),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


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

    def time(self, rate: float | None, rounds: int, seed: int) -> list[list[tuple[float, float]]]:
        """Seconds of forward and of both, the slowest rank's, entry by entry and round by round."""
        self.network.shape(rate)
        self.team.ask("time", rounds=1, seed=seed + 1)  # to warm up
        answers = self.team.ask("time", seconds=ANSWER_SECONDS + 30 * rounds, rounds=rounds, seed=seed)
        return [
            [
                (max(a[entry][turn][0] for a in answers), max(a[entry][turn][1] for a in answers))
                for turn in range(rounds)
            ]
            for entry in range(len(self.job.entries))
        ]


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
        times: dict[float | None, Any] = {}
        for rate in rates:
            times[rate] = bench.time(rate, rounds, work.setting.seed)
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
        rounds=rounds,
        entries=tuple(found),
        machine=describe_machine(),
        notes=_notes(found, network),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - begun,
    )


def _timing(
    entry: Entry, taking: list[Entry], checks: dict[Entry, Any], turns: Any, rate: float | None, shaped: bool
) -> Timing:
    model = rate is not None and not shaped

    def rounds(of: Entry, place: int) -> tuple[float, ...]:
        sent: Bytes = checks[of]["total" if place else "forward"]
        extra = 0.0
        if model and sent.counted is not None:
            assert rate is not None
            extra = sent.calls * ALPHA + max(sent.counted) * 8 / rate
        return tuple((turn[place] + extra) * 1e3 for turn in turns[taking.index(of)])

    ratios = {}
    base = BASELINE.model_copy(update={"routing": entry.routing})
    if base in taking and entry != base:
        seed = taking.index(entry)
        ratios = {
            "forward_ratio": paired_ratio(rounds(entry, 0), rounds(base, 0), seed),
            "total_ratio": paired_ratio(rounds(entry, 1), rounds(base, 1), seed),
        }
    return Timing(rate=rate, modelled=model, forward=rounds(entry, 0), total=rounds(entry, 1), **ratios)


def _notes(found: Sequence[EntryResult], network: Network) -> tuple[str, ...]:
    notes = []
    if not network.shaped:
        notes.append(
            f"The link is modelled ({network.reason}): times are those of the loopback plus {ALPHA * 1e3:g} ms for each "
            "collective and the counted bytes over the rate."
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
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "system": platform.platform(terse=True),
        "torch": torch.__version__,
    }
