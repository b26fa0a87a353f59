"""What a bench found, as plain numbers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from moekit._validation import parse_file
from moekit.bench.dispatch.setting import BASELINE, DispatchBenchSetting, Entry

FILE = "bench.json"
_RESAMPLES = 4000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ratio(_Part):
    """Median of the paired ratios of all rounds, with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @property
    def faster(self) -> bool:
        """Whether the interval lies below 1."""
        return self.high < 1


def paired_ratio(mine: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """Round by round, so that what slows a whole round down cancels out."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return Ratio(
        median=statistics.median(ratios),
        low=medians[int(0.025 * _RESAMPLES)],
        high=medians[int(0.975 * _RESAMPLES) - 1],
    )


class Exactness(_Part):
    """Against one process in fp32.

    Attributes:
        share: tokens whose output is off by at most 1e-5 of its norm.
        error: largest difference of any number.
        largest: largest number there is, to hold the error against.
        gradients: of each tensor: norm of the difference over norm.
    """

    share: float
    error: float
    largest: float
    gradients: dict[str, float]

    @property
    def worst_gradient(self) -> float:
        """Largest of them."""
        return max(self.gradients.values())


class Bytes(_Part):
    """Bytes that leave a node in one step, for each node.

    Attributes:
        sent: by the counter of the device, headers included; None without one.
        counted: by the arguments of the collectives; None where one is not known.
        own: by the dispatcher's own counters, where it has any.
        calls: collectives of the busiest rank.
    """

    sent: tuple[float, ...] | None
    counted: tuple[int, ...] | None
    own: tuple[int, ...] | None = None
    calls: int = 0


class Rows(_Part):
    """Rows as the collectives carried them, against the replay of the same choices.

    Attributes:
        counted: rows out, own ones included, all ranks and layers; across nodes for "hierarchical".
        replayed: what the replay says.
        alike: whether every rank sent every other what the replay says, both ways, forward and backward.
    """

    counted: int
    replayed: int
    alike: bool


class Timing(_Part):
    """Milliseconds of each round, the slowest rank's.

    Attributes:
        rate: bits a second of the link; None unshaped.
        modelled: bytes over rate were added to times on an unshaped link.
        forward: of forward.
        total: of forward and backward.
        forward_ratio: to the baseline; None for itself and where it is missing.
        total_ratio: likewise.
    """

    rate: float | None
    modelled: bool = False
    forward: tuple[float, ...]
    total: tuple[float, ...]
    forward_ratio: Ratio | None = None
    total_ratio: Ratio | None = None

    @property
    def forward_ms(self) -> float:
        """Median."""
        return statistics.median(self.forward)

    @property
    def total_ms(self) -> float:
        """Median."""
        return statistics.median(self.total)


class EntryResult(_Part):
    """One way to send tokens.

    Attributes:
        entry: which.
        skipped: why it took no part; "" if it did.
        shared_batch: every rank held all tokens.
        forward: bytes of forward.
        total: bytes of forward and backward.
        load: expert rows of the busiest rank over the mean.
    """

    entry: Entry
    skipped: str = ""
    shared_batch: bool = False
    exactness: Exactness | None = None
    rows: Rows | None = None
    forward: Bytes | None = None
    total: Bytes | None = None
    load: float | None = None
    timings: tuple[Timing, ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.entry.name

    def at(self, rate: float | None) -> Timing | None:
        """Times at one rate."""
        return next((t for t in self.timings if t.rate == rate), None)


class BenchResult(_Part):
    """A whole bench.

    Attributes:
        setting: sizes.
        source: model and trace, or that the layer is made up.
        layers: decoder layers that one step goes through.
        shaped: the link between nodes was a device of a known rate.
        reason: why it was not.
        rates: in order.
        rounds: of each rate.
        entries: in order, the baseline first.
        machine: what it ran on.
        notes: what a reader must know.
    """

    format: int = 1
    setting: DispatchBenchSetting
    source: str
    layers: tuple[int, ...]
    shaped: bool
    reason: str = ""
    rates: tuple[float | None, ...]
    rounds: int
    entries: tuple[EntryResult, ...]
    machine: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    date: str = ""
    seconds: float = 0.0

    @property
    def baseline(self) -> EntryResult | None:
        """Transformers' all-to-all, if it took part."""
        return next((e for e in self.entries if e.entry == BASELINE and not e.skipped), None)

    def find(self, name: str) -> EntryResult:
        """An entry by its name."""
        return next(entry for entry in self.entries if entry.name == name)

    @classmethod
    def read(cls, path: Path) -> BenchResult:
        """Read a folder's `bench.json`, or that file."""
        hint = "`moekit bench dispatch` writes one"
        file = path / FILE if path.is_dir() else path
        return parse_file(cls, file, what="result of a dispatch bench", missing=hint, hint=hint)
