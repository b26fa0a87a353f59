"""Start this process as one of several ranks, bounded in time everywhere, and end it so that the others know why."""

from __future__ import annotations

import atexit
import math
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from moekit.errors import BadConfig, Interrupted, PeerLost
from moekit.parallel.launch import agreement
from moekit.parallel.launch.environment import (
    STALL_AFTER,
    STALL_VARIABLE,
    TIMEOUT,
    TIMEOUT_VARIABLE,
    Environment,
    seconds,
)
from moekit.parallel.launch.health import Heartbeat, RankGone, is_lost_peer
from moekit.parallel.launch.rendezvous import Rendezvous
from moekit.parallel.launch.stopping import Terminations

LINGER = 30.0  # seconds that a rank with nothing more to do stays for others that work on
SHUTDOWN = 3.0  # seconds that the holder of the store stays for ranks that have been told why it ends
_current: StartedRanks | None = None


def choose_backend(local_world: int) -> str:
    """NCCL where every rank of this machine has a GPU of its own, with gloo for CPU tensors beside it; else gloo."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_world and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


class StartedRanks:
    """This process as a rank, until it is closed; a context manager.

    An error that leaves the `with` block is told to the other ranks. One that only says that some rank is gone leaves
    it as `RankGone`, which says which.

    Attributes:
        place: who this is.
        timeout: seconds that a collective, or an agreement, may take.
        heartbeat: tells who is gone; None for a single rank.
    """

    def __init__(self, place: Environment, timeout: float) -> None:
        self.place, self.timeout = place, timeout
        self.heartbeat: Heartbeat | None = None
        self._store: Store | None = None
        self._terminations: Terminations | None = None
        self._owns_group = self._closed = False
        self._agreements = 0
        self._pid = os.getpid()

    @property
    def rank(self) -> int:
        """Own number."""
        return self.place.rank

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.place.world

    @property
    def _holds_store(self) -> bool:
        return self.rank == 0 and not self.place.launcher_holds_store

    def agree(self, facts: Mapping[str, Any], timeout: float | None = None) -> None:
        """See `agree` below."""
        self._agreements += 1
        if self._store is None:
            return
        try:
            agreement.agree_through(
                self._store, self.rank, self.world, f"agree/{self._agreements}", facts, timeout or self.timeout
            )
        except dist.DistError as error:
            raise PeerLost(f"the store of the ranks does not answer: {str(error).splitlines()[0]}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            named = None if isinstance(error, SystemExit) and error.code in (None, 0) else self._named(error)
        except BaseException as interrupted:
            self.close(interrupted)
            raise
        self.close(named)
        if isinstance(named, RankGone):
            atexit.register(_end_as_lost, named)
        if named is not None and named is not error:
            raise named from error

    def _named(self, error: BaseException | None) -> BaseException | None:
        heartbeat = self.heartbeat
        if error is None or heartbeat is None or isinstance(error, RankGone) or not is_lost_peer(error):
            return error
        found = heartbeat.who_is_gone()
        if heartbeat.stopping and (found is None or found.kind == "stopped"):
            return Interrupted("stopped by SIGTERM, as all ranks were")
        if found is None and isinstance(error, agreement.NotHeard):
            found = heartbeat.departure(error.ranks[0], "behind", f"it did not {error.reason}")
        return error if found is None else RankGone(found)

    def close(self, error: BaseException | None = None, linger: float = math.inf) -> None:
        """Leave the group: without an error together with all others, else at once and telling them why.

        Args:
            error: why this rank leaves.
            linger: seconds at most to wait for the others.
        """
        global _current
        if self._closed or os.getpid() != self._pid:
            return
        try:
            if error is None:
                self._await_others(linger)
        except BaseException as late:
            error = late
            raise
        finally:
            self._closed = True
            _current = None if _current is self else _current
            atexit.unregister(self._at_exit)
            self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        if self._terminations is not None:
            self._terminations.close(failed=error is not None)
        if self.heartbeat is not None:
            if error is not None:
                self._tell(self.heartbeat, error)
            self.heartbeat.stop("left" if error is None else "failed")
        # A group in which a collective is still under way cannot be destroyed without waiting for its time-out; the end
        # of the process closes it as well.
        if self._owns_group and error is None and dist.is_initialized():
            dist.destroy_process_group()
        if self._store is not None:
            self._shut_down(self._store)
            self._store = None

    def _tell(self, heartbeat: Heartbeat, error: BaseException) -> None:
        if isinstance(error, RankGone):
            heartbeat.forward(error.departure)
        elif isinstance(error, KeyboardInterrupt | Interrupted):
            heartbeat.tell("stopped", "interrupted")
        elif isinstance(error, SystemExit):
            heartbeat.tell("failed", f"it ended with exit code {error.code}")
        else:
            heartbeat.tell("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def _await_others(self, linger: float) -> None:
        # A rank that closes its connections early breaks collectives that others are just finishing. The holder of the
        # store stays for as long as the others live.
        if self._store is None:
            return
        bound = min(LINGER, self.timeout)
        if self._holds_store:
            bound = self.timeout if self.heartbeat is None else math.inf
        try:
            self._store.set(f"done/{self.rank}", "")
            agreement.await_keys(self._store, {rank: f"done/{rank}" for rank in range(self.world)}, min(bound, linger))
        except dist.DistError:
            return  # the others have gone, and the store with them

    def _shut_down(self, store: Store) -> None:
        try:
            store.set(f"bye/{self.rank}", "")
            if self._holds_store:
                agreement.await_keys(store, {rank: f"bye/{rank}" for rank in range(self.world)}, SHUTDOWN)
        except dist.DistError:
            return

    def _at_exit(self) -> None:
        # Reached only without `with` and without close().
        error: BaseException | None = getattr(sys, "last_value", None)
        if error is None and self.heartbeat is not None and self.heartbeat.stopping:
            error = Interrupted("SIGTERM")
        named = self._named(error)
        self.close(named, linger=LINGER)
        if isinstance(named, RankGone) and self.heartbeat is not None:
            self.heartbeat.end(str(named.departure))


def _end_as_lost(error: RankGone) -> None:
    # Nobody caught it, and Python has shown it: a script ends with the same code as a command of moekit's own.
    if getattr(sys, "last_value", None) is error:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)


def current() -> StartedRanks | None:
    """What `start_ranks` began in this process and nobody has closed yet."""
    return _current


def start_ranks(
    *,
    timeout: float | None = None,
    stall_after: float | None = None,
    heartbeat: bool = True,
    backend: str | None = None,
    group_of_one: bool = False,
) -> StartedRanks:
    """Become one of several ranks, as torchrun's variables say; use it with `with`.

    Without them, or with one rank, nothing is started and everything else works.

    Args:
        timeout: seconds for every collective and for the start itself; MOEKIT_RANK_TIMEOUT, or 300, by default.
        stall_after: seconds without a sign of life after which a rank is taken for dead and this process ends with code
            5; MOEKIT_STALL_AFTER, or 15, by default.
        heartbeat: whether to give signs of life and watch for the others'.
        backend: of torch.distributed; see `choose_backend`.
        group_of_one: make a process group for a single rank, too.

    Raises:
        BadConfig: variables are missing or wrong, or ranks disagree about them.
        PeerLost: a rank or the store does not come in time.
    """
    global _current
    if _current is not None:
        raise BadConfig("the ranks have been started already", hint="close() them first")
    place = Environment.read(os.environ)
    ranks = StartedRanks(place, seconds(timeout, TIMEOUT_VARIABLE, TIMEOUT, os.environ))
    stall = seconds(stall_after, STALL_VARIABLE, STALL_AFTER, os.environ)
    kind = backend or choose_backend(place.local_world)
    if place.world > 1:
        _join(ranks, kind, stall if heartbeat else None)
    elif group_of_one and not dist.is_initialized():
        _start_group(ranks, kind, dist.HashStore())  # type: ignore[attr-defined]
    _current = ranks
    atexit.register(ranks._at_exit)
    return ranks


def _join(ranks: StartedRanks, backend: str, stall_after: float | None) -> None:
    place, bound = ranks.place, ranks.timeout
    holds = place.rank == 0 and not place.launcher_holds_store and not dist.is_initialized()
    store = ranks._store = place.connect(bound, serve=holds)
    try:
        people = Rendezvous(place, store, backend).hold(bound)
        if stall_after is not None:
            ranks.heartbeat = Heartbeat(
                lambda: place.connect(stall_after),
                place.rank,
                people,
                store_at=f"{place.host}:{place.port}",
                store_rank=None if place.launcher_holds_store else 0,
                stall_after=stall_after,
            )
            ranks.heartbeat.start()
            ranks._terminations = Terminations.install(ranks.heartbeat)
        if not dist.is_initialized():
            _start_group(ranks, backend, PrefixStore("group", store))
    except dist.DistError as error:
        lost = PeerLost(f"the ranks cannot meet: {str(error).splitlines()[0]}", hint="a rank or the launcher died")
        named = ranks._named(lost)
        ranks.close(named)
        raise named or lost from error
    except BaseException as error:
        ranks.close(error)
        raise


def _start_group(ranks: StartedRanks, backend: str, store: Store) -> None:
    if "nccl" in backend:
        torch.cuda.set_device(ranks.place.local_rank)
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=ranks.timeout)
    )
    ranks._owns_group = True


def agree(timeout: float | None = None, **facts: Any) -> None:
    """Make sure that all ranks are about to do the same; without other ranks it does nothing.

    Every rank calls it in the same order with the same names.

    Args:
        timeout: seconds to wait for the others; that of `start_ranks` by default.
        **facts: what must be equal everywhere: numbers, strings, mappings, pydantic models, tensors, versions.

    Raises:
        BadConfig: on every rank alike, naming the facts, the ranks that differ and both values.
        PeerLost: a rank did not say anything in time.
    """
    ranks = current()
    if ranks is not None:
        ranks.agree(facts, timeout)
    elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, agreement.statements(facts))
        lines = agreement.compare(dict(enumerate(told)))
        if lines:
            raise agreement.disagreement(lines)
