"""What ranks write of themselves and of each other, and what follows from it: no processes, no store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["silent", "failed", "stopped", "left", "behind", "evicted", "store"]
SAYING: dict[Kind, str] = {
    "silent": "is gone",
    "failed": "failed first",
    "stopped": "was stopped",
    "left": "had ended before",
    "behind": "lives but is behind",
    "evicted": "(this one) was evicted",
}


@dataclass(eq=False)
class Counters:
    """Collectives of this rank so far."""

    entered: int = 0
    finished: int = 0


counters = Counters()


@dataclass(frozen=True)
class Beat:
    """What a rank writes again and again.

    Attributes:
        count: grows with every beat.
        entered: collectives entered.
        finished: collectives finished.
        state: "running", or "left" once it has nothing more to do.
    """

    count: int
    entered: int
    finished: int
    state: str = "running"

    @classmethod
    def parse(cls, text: str) -> Beat:
        """Read what `str` wrote."""
        count, entered, finished, state = text.split()
        return cls(int(count), int(entered), int(finished), state)

    def __str__(self) -> str:
        return f"{self.count} {self.entered} {self.finished} {self.state}"


@dataclass(frozen=True)
class Departure:
    """Who is gone and why.

    Attributes:
        rank: global rank; None if it is the launcher's store.
        kind: how it is known.
        reason: in words.
        who: the rank with process and host.
    """

    rank: int | None
    kind: Kind
    reason: str
    who: str

    def __str__(self) -> str:
        return self.reason if self.kind == "store" else f"{self.who} {SAYING[self.kind]}: {self.reason}"


@dataclass(frozen=True)
class Notice:
    """What a rank tells all others, once: `by` says that `about` is gone."""

    by: int
    about: int
    kind: Kind
    reason: str


@dataclass(eq=False)
class BeatMonitor:
    """For how long each rank has been silent.

    Attributes:
        longest_step: seconds between two looks that count at most; a longer gap was this process's own.
    """

    longest_step: float
    beats: dict[int, Beat] = field(default_factory=dict)
    silence: dict[int, float] = field(default_factory=dict)
    _looked: dict[int, float] = field(default_factory=dict)

    def hear(self, beats: Mapping[int, Beat], now: float) -> None:
        """Take in what was read at a time in seconds."""
        for rank, beat in beats.items():
            before = self.beats.get(rank)
            self.beats[rank] = beat
            if before is None or beat.count != before.count:
                self.silence[rank] = 0.0
            else:
                self.silence[rank] += min(now - self._looked[rank], self.longest_step)
            self._looked[rank] = now

    def most_silent(self, limit: float, but: Iterable[int] = ()) -> int | None:
        """The running rank that is silent for longest, if that is `limit` seconds or more."""
        passed = set(but)
        silent = {
            rank: seconds
            for rank, seconds in list(self.silence.items())  # another thread adds to it
            if seconds >= limit and rank not in passed and self.beats[rank].state == "running"
        }
        return max(silent, key=lambda rank: silent[rank], default=None)

    def behind(self, own: Beat) -> tuple[int, str] | None:
        """The rank that entered fewest collectives, if fewer than this one."""
        running = {rank: beat for rank, beat in list(self.beats.items()) if beat.state == "running"}
        last = min(running, key=lambda rank: running[rank].entered, default=None)
        if last is None or running[last].entered >= own.entered:
            return None
        return last, f"it has entered {running[last].entered} exchanges, this rank {own.entered}"
