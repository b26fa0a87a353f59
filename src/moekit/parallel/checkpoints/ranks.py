"""Ranks that do something together: all succeed, or all raise, and the error names the rank that failed."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moekit.checkpoint.atomic import atomic_folder, is_disk_full
from moekit.errors import MoekitError, OutOfBudget, PeerLost

T = TypeVar("T")
_LOOK_SECONDS = 2.0


class Peers:
    """The ranks of a group, or this process alone.

    Args:
        group: process group; None for all ranks, or for this process where there are no ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)
        self._processes: list[tuple[str, int]] = []
        self._processes = self.together("meeting", lambda: (socket.gethostname(), os.getpid()))

    def together(self, doing: str, work: Callable[[], T]) -> list[T]:
        """Every rank does its work; the results of all, or one error everywhere.

        Args:
            doing: what, for the error.
            work: called here; its result travels to the other ranks.

        Raises:
            MoekitError: some rank failed, of that rank's type, naming it.
            PeerLost: a rank died or stalled.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return [result]  # type: ignore[list-item]
        told = (result, None if failure is None else _named(failure, doing))
        everyone: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everyone, told, group=self.group)
        except (RuntimeError, dist.DistError) as error:
            raise self._lost(doing, error) from error
        failures = {rank: error for rank, (_, error) in enumerate(everyone) if error is not None}
        if failures:
            raise _merged(failures, self.size) from failure
        return [answer for answer, _ in everyone]

    def first(self, doing: str, work: Callable[[], T]) -> T:
        """Rank 0 does it, every rank gets the result, or the error; see `together`."""
        answer = self.together(doing, lambda: work() if self.rank == 0 else None)[0]
        return answer  # type: ignore[return-value]

    def transfer(self, doing: str, work: Callable[[], object]) -> None:
        """Call a save or load of torch.distributed.checkpoint, which coordinates the ranks by itself.

        Raises:
            MoekitError: some rank failed, of that rank's type, naming it.
            PeerLost: a rank died or stalled.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                work()
        except CheckpointException as error:
            if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
                raise KeyboardInterrupt from error
            failures = {rank: _named(cause, doing) for rank, (cause, _) in error.failures.items()}
            raise _merged(failures, self.size) from error
        except (RuntimeError, dist.DistError) as error:
            raise self._lost(doing, error) from error

    @contextlib.contextmanager
    def folder(self, target: Path, *, overwrite: bool) -> Iterator[Path]:
        """A folder that all ranks write into and that gets its name at the end, whole or not at all.

        Raises:
            BadConfig: the folder exists, or another process is writing it; or a rank does not see it.
            OutOfBudget: the disk is full.
            PeerLost: a rank died; rank 0 has removed what was written.
        """
        with contextlib.ExitStack() as held:
            temporary = self.first("making the folder", lambda: held.enter_context(_make(target, overwrite)))
            yield temporary
            self.first("giving the folder its name", held.close)

    def _lost(self, doing: str, error: BaseException) -> PeerLost:
        gone = self._gone()
        who = f"rank {', '.join(map(str, gone))} is gone" if gone else "a rank died or stalled"
        text = str(error).strip()
        return PeerLost(
            f"{who}: {doing} failed on rank {self.rank}{f' ({text.splitlines()[0]})' if text else ''}",
            hint="its own last lines say why; start again: a save that failed leaves nothing under its name",
        )

    def _gone(self) -> list[int]:
        """Ranks of this machine whose process has ended; those of other machines cannot be looked at."""
        here = socket.gethostname()
        deadline = time.monotonic() + _LOOK_SECONDS
        while True:
            ended = [r for r, (host, pid) in enumerate(self._processes) if host == here and _ended(pid)]
            if ended or time.monotonic() > deadline:
                return ended
            time.sleep(0.05)


def _make(target: Path, overwrite: bool) -> contextlib.AbstractContextManager[Path]:
    return atomic_folder(target, overwrite=overwrite)


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A process that its parent has not noticed yet is still listed, as a zombie.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return state in {"Z", "X"}


def _named(error: BaseException, doing: str) -> MoekitError:
    """An error as it travels between ranks."""
    if isinstance(error, MoekitError):
        return error
    if is_disk_full(error):
        return OutOfBudget(f"the disk is full: {error}", hint="free some space, or write to another disk")
    return PeerLost(f"{doing} failed: {type(error).__name__}: {error}", hint="the lines above, of that rank, say where")


def _merged(failures: dict[int, MoekitError], size: int) -> MoekitError:
    """One error of all ranks' errors."""
    first = failures[min(failures)]
    if len(failures) == size and len({str(error) for error in failures.values()}) == 1:
        message = first.message
    else:
        same = [rank for rank, error in failures.items() if str(error) == str(first)]
        message = f"rank {', '.join(map(str, same))}: {first.message}"
    return type(first)(message, file=first.file, layer=first.layer, expert=first.expert, hint=first.hint)
