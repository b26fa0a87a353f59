"""All ranks say who they are before anything else is tried."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

from torch.distributed.distributed_c10d import Store

from moekit.errors import BadConfig, PeerLost
from moekit.parallel.launch import agreement
from moekit.parallel.launch.environment import Environment


class Rendezvous:
    """One rank's part in it.

    Args:
        place: who this is.
        store: of the ranks.
        backend: that this rank means to use.
    """

    def __init__(self, place: Environment, store: Store, backend: str) -> None:
        self.place, self.store, self.stopped = place, store, False
        self.told: dict[int, dict[str, Any]] = {}
        person = f"pid {os.getpid()} on host {socket.gethostname()}"
        self.own = {"WORLD_SIZE": place.world, "backend": backend, "person": person}

    def hold(self, timeout: float) -> list[str]:
        """Process and host of every rank, by rank.

        Raises:
            BadConfig: ranks disagree about how many they are or what they talk over, or two have one number.
            PeerLost: a rank does not come in time, or SIGTERM comes before.
        """
        place, main = self.place, threading.current_thread() is threading.main_thread()
        if self.store.add(f"claim/{place.rank}", 1) > 1:
            raise BadConfig(f"two processes were started as rank {place.rank}", hint="give each its own RANK")
        self.store.set(f"beat/{place.rank}", "0 0 0 running")
        self.store.set(f"hello/{place.rank}", json.dumps(self.own))
        before = signal.signal(signal.SIGTERM, self._stop) if main else None
        try:
            deadline = time.monotonic() + timeout
            while not self._heard() and not self.stopped and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)
        self._judge(timeout)
        return [str(self.told[rank]["person"]) for rank in range(place.world)]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    def _heard(self) -> bool:
        # Rank 0 may know of a larger world than this rank does, and the other way round.
        known = max([self.place.world, self.place.rank + 1, *(told["WORLD_SIZE"] for told in self.told.values())])
        for rank in range(known):
            if rank not in self.told and self.store.check([f"hello/{rank}"]):
                self.told[rank] = json.loads(self.store.get(f"hello/{rank}"))
        return len(self.told) >= known or any(told["WORLD_SIZE"] != self.place.world for told in self.told.values())

    def _judge(self, timeout: float) -> None:
        facts = ("WORLD_SIZE", "backend")
        if any(told[fact] != self.own[fact] for told in self.told.values() for fact in facts):
            time.sleep(1.0)  # those who come just now are named too, and read this before rank 0 takes the store away
            self._heard()
            said = {
                rank: {fact: agreement.Statement(str(told[fact]), str(told[fact])) for fact in facts}
                for rank, told in self.told.items()
            }
            raise agreement.disagreement(agreement.compare(said))
        late = [rank for rank in range(self.place.world) if rank not in self.told]
        if late:
            why = "before this one was told to stop" if self.stopped else f"within {timeout:.3g} s"
            raise PeerLost(
                f"{agreement.name_ranks(late)} did not start {why}",
                hint=f"the last lines of {agreement.name_ranks(late)} say why, if it ran at all",
            )
