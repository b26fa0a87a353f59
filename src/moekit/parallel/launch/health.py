"""Signs of life: every rank leaves a beat in the store, watches the others' beats, and ends when one of them is gone.

A collective cannot be trusted to end: a backend sees a closed connection but names a port, and sees nothing at all
where a process was stopped. So two threads stand beside the main one, which may be stuck. The first talks to the store
over a connection of its own; the second never waits for anything, judges what the first has read, and ends the process.

Time here is time that this process lived through: whoever suspends a whole job and lets it go on finds nobody gone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from moekit.errors import PeerLost
from moekit.parallel.launch.beats import Beat, BeatMonitor, Departure, Kind, Notice, counters

_log = logging.getLogger(__name__)

WATCHED = 16  # ranks that each rank watches, the next ones in order: the store's load grows with ranks, not its square
PATIENCE = 10.0  # seconds for a main thread that knows who is gone to end in its own way
_BACKEND = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out|socket timeout|broken pipe", re.IGNORECASE
)


def note(*, finished: bool = False) -> None:
    """Count a collective that this rank enters, or has finished; it tells who keeps the others waiting."""
    if finished:
        counters.finished += 1
    else:
        counters.entered += 1


class RankGone(PeerLost):
    """A rank is gone, and it is known which.

    Args:
        departure: who and why.
    """

    def __init__(self, departure: Departure) -> None:
        look = "the launcher's last lines" if departure.rank is None else f"the last lines of rank {departure.rank}"
        super().__init__(str(departure), hint=f"{look} may say more; start again from the last checkpoint")
        self.departure = departure


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what is seen of another rank's end."""
    if isinstance(error, PeerLost | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_BACKEND.search(str(error)))


class Heartbeat:
    """The two threads of one rank.

    Args:
        connect: opens a connection to the store that nothing else uses.
        rank: own global rank.
        people: process and host of every rank, by rank.
        store_at: where the store is, for messages.
        store_rank: the rank that holds it; None if the launcher does.
        stall_after: seconds without a sign of life after which a rank is gone.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        rank: int,
        people: list[str],
        *,
        store_at: str,
        store_rank: int | None,
        stall_after: float,
    ) -> None:
        self.rank, self.people, self.stall_after = rank, people, stall_after
        self.interval = min(0.5, stall_after / 8)
        # Who has seen a connection close need not wait that long to believe that a silent rank is gone.
        self.suspect_after = min(stall_after, max(4 * self.interval, 1.5))
        self._connect, self._store_at, self._store_rank = connect, store_at, store_rank
        self._watched = [(rank + step) % len(people) for step in range(1, min(WATCHED + 1, len(people)))]
        self._everyone = [other for other in range(len(people)) if other != rank]
        self._beats_heard = BeatMonitor(2 * self.interval)
        self._notices: list[Notice] = []
        self._read: set[int] = set()
        self._outbox: deque[Notice] = deque()
        self._told: set[Notice] = set()
        self._count = 0
        self._state = "running"
        self._asking = 0
        self._main_until = 0.0
        self.stopping = False  # SIGTERM has come
        self._store_seen = time.monotonic()
        self._store_silence = 0.0
        self._store_error: str | None = None
        self._wake, self._closed, self._finishing = threading.Event(), threading.Event(), False
        self._ending = threading.Lock()
        self._threads = [
            threading.Thread(target=self._live, name="moekit-heartbeat", daemon=True),
            threading.Thread(target=self._judge, name="moekit-judge", daemon=True),
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self, state: str = "left") -> None:
        """Write a last beat and whatever is still to be told, and end both threads."""
        self._state, self._finishing = state, True
        self._wake.set()
        self._threads[0].join(2.0)
        self._closed.set()
        self._threads[1].join(2.0)

    def tell(self, kind: Kind, reason: str, about: int | None = None) -> None:
        """Tell all ranks that one is gone, this one by default; does not wait."""
        notice = Notice(self.rank, self.rank if about is None else about, kind, reason)
        if notice not in self._told:
            self._told.add(notice)
            self._outbox.append(notice)
            self._wake.set()

    def own_beat(self) -> Beat:
        """As it would be written now."""
        return Beat(self._count, counters.entered, counters.finished, self._state)

    # ------------------------------------------------------------------ the thread that talks to the store

    def _live(self) -> None:
        try:
            store = self._connect()
            while True:
                finishing = self._finishing
                self._exchange(store)
                self._store_seen = time.monotonic()
                if finishing:
                    return
                self._wake.wait(self.interval / 4 if self._asking else self.interval)
                self._wake.clear()
        except (RuntimeError, ValueError) as error:
            self._store_error = str(error).splitlines()[0] if str(error) else type(error).__name__

    def _exchange(self, store: Store) -> None:
        while self._outbox:
            number = store.add("notices", 1)
            store.set(f"notice/{number}", json.dumps(asdict(self._outbox.popleft())))
        self._count += 1
        store.set(f"beat/{self.rank}", str(self.own_beat()))
        ranks = self._everyone if self._asking else self._watched
        texts = store.multi_get([f"beat/{rank}" for rank in ranks])
        beats = {rank: Beat.parse(text.decode()) for rank, text in zip(ranks, texts, strict=True)}
        self._beats_heard.hear(beats, time.monotonic())
        # A rank may die between taking a number and writing under it: such a gap is passed by.
        for number in range(1, store.add("notices", 0) + 1):
            key = f"notice/{number}"
            if number not in self._read and store.check([key]):
                self._read.add(number)
                self._notices.append(Notice(**json.loads(store.get(key))))

    def _judge(self) -> None:
        last, seen, due = time.monotonic(), self._store_seen, None
        while not self._closed.wait(self.interval):
            now = time.monotonic()
            if self._store_seen == seen:
                self._store_silence += min(now - last, 2 * self.interval)
            else:
                self._store_silence, seen = 0.0, self._store_seen
            last = now
            found = self.verdict(self.stall_after) or (None if self.stopping else self._stopped())
            if found is None:
                continue
            if due is None:
                due = now + self._grace(found)
                self.forward(found)
            if now >= max(due, self._main_until):
                self.end(str(found))

    def _grace(self, found: Departure) -> float:
        # Who reported its end is seen to close its connections: the main thread may well notice by itself.
        return {"silent": 2 * self.interval, "store": 1.0}.get(found.kind, self.stall_after)

    def forward(self, found: Departure) -> None:
        """Tell the others what was found here."""
        if found.rank is not None and found.kind not in ("store", "evicted"):
            self.tell(found.kind, found.reason, found.rank)

    def verdict(self, limit: float) -> Departure | None:
        """Who is gone for certain, with `limit` seconds of silence taken for death."""
        for notice in self._notices:
            if notice.kind == "stopped" or notice.about == notice.by == self.rank:
                continue
            if notice.about == self.rank:
                return self.departure(self.rank, "evicted", f"rank {notice.by} says: {notice.reason}")
            return self.departure(notice.about, notice.kind, notice.reason)
        if self._store_error is not None:
            return self._without_store("is gone", "died")
        if self._store_silence >= self.stall_after:
            return self._without_store(f"does not answer for {self.stall_after:.3g} s", "died or stalled")
        # Who was told of, and who told, is about to end and need not live on.
        ending = [rank for notice in self._notices for rank in (notice.about, notice.by)]
        silent = self._beats_heard.most_silent(limit, but=ending)
        if silent is None:
            return None
        return self.departure(silent, "silent", f"no sign of life for {self._beats_heard.silence[silent]:.3g} s")

    def departure(self, rank: int, kind: Kind, reason: str) -> Departure:
        """With the process and host of a rank."""
        return Departure(rank, kind, reason, f"rank {rank} ({self.people[rank]})")

    def _without_store(self, state: str, fate: str) -> Departure:
        rank = self._store_rank
        owner = "the launcher" if rank is None else f"rank {rank} ({self.people[rank]})"
        reason = f"the store on {self._store_at} {state}: {owner}, which holds it, {fate}"
        return Departure(rank, "store", reason, owner)

    # ------------------------------------------------------------------ asked by the main thread

    def who_is_gone(self, wait: float | None = None) -> Departure | None:
        """After a failed collective: wait until it is clear who caused it.

        Args:
            wait: seconds at most; by default a little more than a silent rank needs to be noticed.

        Returns:
            The first rank that failed or fell silent; else one that ended before, fell behind or was stopped; None if
            every rank lives and has come as far as this one.
        """
        return self._search(wait, lambda: False) or self._milder()

    def gone_while_stopping(self, wait: float) -> Departure | None:
        """After SIGTERM: who is gone, or None as soon as all others are seen to be stopped too."""
        return self._search(wait, self._all_stopping)

    def _search(self, wait: float | None, enough: Callable[[], bool]) -> Departure | None:
        # No locks: a signal handler may run amid this in the same thread.
        bound = self.suspect_after + 6 * self.interval if wait is None else wait
        deadline = time.monotonic() + bound
        self._main_until = max(self._main_until, deadline + PATIENCE)
        self._asking += 1
        self._wake.set()
        try:
            while True:
                found = self.verdict(self.suspect_after)
                if found is not None or enough() or time.monotonic() >= deadline:
                    return found
                time.sleep(0.02)
        finally:
            self._asking -= 1

    def _all_stopping(self) -> bool:
        stopped = {notice.about for notice in self._notices if notice.kind == "stopped"}
        left = {rank for rank, beat in list(self._beats_heard.beats.items()) if beat.state == "left"}
        return stopped | left >= set(self._everyone)

    def _milder(self) -> Departure | None:
        for rank, beat in list(self._beats_heard.beats.items()):
            if beat.state == "left":
                return self.departure(rank, "left", "it had nothing more to do")
        behind = self._beats_heard.behind(self.own_beat())
        if behind is not None:
            return self.departure(behind[0], "behind", behind[1])
        return self._stopped()

    def _stopped(self) -> Departure | None:
        stopped = [notice for notice in self._notices if notice.kind == "stopped" and notice.about != self.rank]
        return self.departure(stopped[0].about, "stopped", stopped[0].reason) if stopped else None

    def end(self, line: str, code: int = PeerLost.exit_code) -> None:
        """Log one last line and end the process at once, whatever its main thread does."""
        if not self._ending.acquire(blocking=False):
            return

        def say() -> None:
            _log.error(line)
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()

        # A main thread stuck in a write may hold the locks that this needs.
        speaker = threading.Thread(target=say, daemon=True)
        speaker.start()
        speaker.join(2.0)
        os._exit(code)
