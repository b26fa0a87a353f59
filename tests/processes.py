"""Python processes for tests, forked from one that has imported torch and transformers already.

Importing both takes five seconds of processor time, more than most tests need for all else. What a test wants to see is
a process of its own: with its arguments, variables, folder and exit code, to be killed or interrupted. Tests about
start-up itself (what is imported, how much memory is taken) start a real one.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Told by launchers: a process of a test is no rank unless it is said to be one.
RANKED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def warm() -> ForkServerContext:
    """The context whose processes are forked from a warm one; it starts with the first of them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def free_port() -> int:
    """A port of the loopback nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """A process that was started; what it prints goes to files.

    Args:
        args: as Python takes them: -c CODE, -m MODULE or a script, and its arguments.
        cwd: folder to work in.
        env: variables beside those of the tests.
    """

    def __init__(self, args: Sequence[Any], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.args = [str(arg) for arg in args]
        self._printed = Path(tempfile.mkdtemp(prefix="moekit-test-"))
        variables = {key: value for key, value in os.environ.items() if key not in RANKED}
        variables |= {"OMP_NUM_THREADS": "1", **(env or {})}
        words = (self.args, str(cwd or Path.cwd()), variables, str(self._printed))
        self.process: BaseProcess = warm().Process(target=_be_python, args=words, daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit code, negative of a signal; None while it runs."""
        return self.process.exitcode

    def output(self, name: str = "out") -> str:
        """What it has printed so far: "out" or "err"."""
        return (self._printed / name).read_text(errors="replace") if (self._printed / name).exists() else ""

    def wait(self, timeout: float = 240) -> CompletedProcess[str]:
        """Its end; killed and an error after so many seconds."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.kill()
        done = CompletedProcess(self.args, int(self.process.exitcode or 0), self.output("out"), self.output("err"))
        shutil.rmtree(self._printed, ignore_errors=True)
        assert not late, f"it has not ended within {timeout} s: {done.stderr[-3000:]}"
        return done

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self.process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
        self.process.join()


def python(args: Sequence[Any], *, timeout: float = 240, **how: Any) -> CompletedProcess[str]:
    """A process from its start to its end."""
    return Running(args, **how).wait(timeout)


def ranks(
    args: Sequence[Any], world: int, *, timeout: float = 240, env: Mapping[str, str] | None = None, **how: Any
) -> list[CompletedProcess[str]]:
    """Processes told by variables that they are ranks of one job, as a launcher tells them; once one fails, all end."""
    port = str(free_port())
    job = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [
        Running(args, env={**(env or {}), **job, "RANK": str(n), "LOCAL_RANK": str(n)}, **how) for n in range(world)
    ]
    deadline = time.monotonic() + timeout
    while any(rank.poll() is None for rank in each) and not any(rank.poll() for rank in each):
        assert time.monotonic() < deadline, [rank.output("err")[-2000:] for rank in each]
        time.sleep(0.02)
    if any(rank.poll() for rank in each):
        time.sleep(0.5)  # for last words
        for rank in each:
            rank.kill()
    return [rank.wait() for rank in each]


def _be_python(args: list[str], folder: str, variables: dict[str, str], printed: str) -> None:
    os.setsid()
    for name, number, mode in (("/dev/null", 0, os.O_RDONLY), ("out", 1, os.O_WRONLY), ("err", 2, os.O_WRONLY)):
        os.dup2(os.open(os.path.join(printed, name), mode | (os.O_CREAT if number else 0)), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.path[:0] = [folder, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        _run(args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _run(args: list[str]) -> None:
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(args[1], "<string>", "exec"), main.__dict__)
    elif args[0] == "-m":
        sys.argv = [args[1], *args[2:]]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(args)
        runpy.run_path(args[0], run_name="__main__")
