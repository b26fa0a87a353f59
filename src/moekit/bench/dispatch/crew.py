"""The processes of a bench: started on their nodes, told what to do line by line, and gone at the end."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.bench.dispatch.network import Network
from moekit.bench.dispatch.setting import Job
from moekit.errors import PeerLost

START_SECONDS = 180.0
ANSWER_SECONDS = 300.0
# How often somebody looks whether all are alive.
LOOK_SECONDS = 1.0


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
        found: dict[int, Any] = {}
        while len(found) < len(self.processes):
            waiting = {self.answers[rank]: rank for rank in range(len(self.processes)) if rank not in found}
            ready, _, _ = select.select(list(waiting), [], [], LOOK_SECONDS)
            for pipe in ready:
                found[waiting[pipe]] = self._answer(waiting[pipe])
            # A rank that waits for a dead one may never answer.
            self._refuse_killed()
            if not ready and time.monotonic() > until:
                rank = min(waiting.values())
                raise PeerLost(f"rank {rank} of the bench does not answer in time", hint=_tail(self.logs[rank]))
        return [found[rank] for rank in range(len(self.processes))]

    def _answer(self, rank: int) -> Any:
        line = self.answers[rank].readline()
        answer = json.loads(line) if line else {"error": "ended without an answer"}
        if "ok" in answer:
            return answer["ok"]
        # Ranks that lose another one fail, too: what matters is who went first, which may take a moment to show.
        until = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < until:
            self._refuse_killed()
            time.sleep(0.05)
        lines = answer["error"].strip().splitlines()
        where = " | ".join(map(str.strip, lines[-6:-1])) or _tail(self.logs[rank])
        raise PeerLost(f"rank {rank} of the bench failed: {lines[-1]}", hint=where)

    def _refuse_killed(self) -> None:
        for rank, process in enumerate(self.processes):
            if (process.poll() or 0) < 0:
                number = -(process.returncode or 0)
                raise PeerLost(f"rank {rank} of the bench was ended by signal {number}", hint=_tail(self.logs[rank]))


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
