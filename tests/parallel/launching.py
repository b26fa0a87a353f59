"""Start ranks as users do, by torchrun or by variables, and see how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.processes import free_port, warm

SCRIPTS = Path(__file__).parent / "fault_scripts"
BOUND = 90.0  # seconds after which a job hangs; the machine may be busy


@dataclass
class Job:
    """Processes of a job; `codes` asks for their exit codes, None while they run."""

    folder: Path
    codes: Callable[[], list[int | None]]

    def wait(self, but: int | None = None) -> list[int | None]:
        """Exit codes, once all have ended (but one that cannot)."""
        self._until(lambda: all(code is not None for place, code in enumerate(self.codes()) if place != but))
        return self.codes()

    def until_printed(self, text: str, ranks: int) -> None:
        """Wait until so many ranks have printed something on stdout."""
        self._until(lambda: sum(text in out.read_text() for out in self.folder.rglob("stdout.log")) >= ranks)

    def _until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + BOUND
        while not done():
            assert time.monotonic() < deadline, f"it hangs: {self.codes()} {self.words()}"
            time.sleep(0.05)

    def words(self) -> dict[int, list[str]]:
        """What each rank wrote on stderr."""
        return {
            int(path.parent.name): [line for line in path.read_text().splitlines() if line.strip()]
            for path in self.folder.rglob("stderr.log")
        }

    def last_words(self, rank: int) -> str:
        """The last message: a line, with its hint where it has one."""
        lines = self.words()[rank]
        return "\n".join(lines[-2:] if lines and lines[-1].startswith("  -> ") else lines[-1:])

    def pids(self) -> dict[int, int]:
        """Of all ranks, as they printed them."""
        return {
            int(path.parent.name): int(line.split()[1])
            for path in self.folder.rglob("stdout.log")
            for line in path.read_text().splitlines()
            if line.startswith("pid ")
        }


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


USUAL = {"MOEKIT_STALL_AFTER": "4", "MOEKIT_RANK_TIMEOUT": "60", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def _be_rank(folder: Path, variables: dict[str, str], args: tuple[str, int, str]) -> None:
    os.environ.update(variables)
    for name, number in (("stdout.log", 1), ("stderr.log", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    from tests.parallel.fault_scripts.rank import main

    sys.exit(main(*args))


@contextmanager
def by_hand(
    folder: Path, *args: object, world: int = 3, each: dict[int, dict[str, str]] | None = None, **env: str
) -> Iterator[Job]:
    """Ranks told by variables only; rank 0 holds the store. Forked from a process that has imported torch already."""
    context = warm()
    port, processes = str(free_port()), list[BaseProcess]()
    for rank in range(world):
        (folder / str(rank)).mkdir()
        own = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
        variables = USUAL | own | env | (each or {}).get(rank, {})
        process = context.Process(target=_be_rank, args=(folder / str(rank), variables, args), daemon=True)
        process.start()
        processes.append(process)
    try:
        yield Job(folder, lambda: [process.exitcode for process in processes])
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def torchrun(folder: Path, *args: object, world: int = 3, script: str = "rank.py", **env: str) -> Iterator[Job]:
    """Ranks started by the launcher, which holds the store."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MOEKIT_", "TORCHELASTIC_"))}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["--log-dir", str(folder), "--redirects", "3", str(SCRIPTS / script), *map(str, args)]
    with (folder / "launcher.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=clean | USUAL | {"OMP_NUM_THREADS": "1"} | env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield Job(folder, lambda: [process.poll()])
    finally:
        with suppress(ProcessLookupError):  # the ranks belong to the launcher's process group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
