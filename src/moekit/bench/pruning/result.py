"""What a bench of pruning methods found: plain numbers, as a JSON file.

Legend: E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moekit._validation import parse_file
from moekit.bench.pruning.setting import Keep, PruneBenchSetting, same_keep
from moekit.checkpoint.atomic import atomic_write
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.pairs import PairedDifference

FILE = "bench.json"
# Calibration and text that are not a single domain's.
ALL = "all"
MAX_BYTES = 1 << 30


class Cut(BaseModel):
    """How much of a domain's text stands by itself: passages of one document resemble each other.

    Attributes:
        domain: its name.
        passages: texts that count as units.
        documents: that they are of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    passages: int
    documents: int

    @property
    def is_cut(self) -> bool:
        """Whether a document gave more than one unit."""
        return self.passages > self.documents

    @property
    def words(self) -> str:
        """Such as "5 passages of 1 document"."""
        return f"{self.passages} passages of {self.documents} document{'' if self.documents == 1 else 's'}"


class CalibrationDraw(BaseModel):
    """A text that methods decided from.

    Attributes:
        name: "all", or the one domain it is of.
        domains: tokens of each domain.
        documents: how many.
        passages: that they were cut into; None where they were not.
        never_routed: decoder layer -> experts that no token chose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    domains: dict[str, int]
    documents: int
    passages: int | None = None
    never_routed: dict[int, int]

    @property
    def tokens(self) -> int:
        """Tokens of all domains."""
        return sum(self.domains.values())


class PruneRun(BaseModel):
    """One method at one budget with one seed, decided from one text, measured on all held-out documents.

    Attributes:
        name: what to call the method with its knobs.
        method: name in the catalogue.
        settings: all knobs.
        keep: the budget.
        seed: of everything random.
        calibration: the text it decided from: "all" or a domain.
        perplexity: likelihood of each held-out document.
        experts: decoder layer -> experts that stay.
        reconstruction: decoder layer -> ||Z' - Z|| / ||Z||, the block's output against the unchanged one.
        lost_tokens: decoder layer -> share of tokens that had chosen an expert which is gone.
        lost_choices: decoder layer -> share of choices of such experts.
        bytes: of the smaller checkpoint's weights.
        decide_seconds: scores and outcomes.
        rewrite_seconds: new weights.
        figures: what the method tells of its outcomes and new weights, means over layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    method: str
    settings: dict[str, Any]
    keep: Keep
    seed: int
    calibration: str
    perplexity: PerplexityResult
    experts: dict[int, int]
    reconstruction: dict[int, float]
    lost_tokens: dict[int, float]
    lost_choices: dict[int, float]
    bytes: int
    decide_seconds: float
    rewrite_seconds: float
    figures: dict[str, float] = {}

    @property
    def mean_reconstruction(self) -> float:
        """Mean over layers."""
        return _mean(self.reconstruction)

    @property
    def mean_lost_tokens(self) -> float:
        """Mean over layers."""
        return _mean(self.lost_tokens)


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0


class Skipped(BaseModel):
    """A method that took no part, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    calibration: str
    reason: str


class Share(BaseModel):
    """A share with its 95 % interval over documents; None with a single document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    low: float | None
    high: float | None


class RankRow(BaseModel):
    """One method in a ranking; runs of several seeds are averaged document by document.

    Attributes:
        name: of the method with its knobs.
        method: name in the catalogue.
        seeds: runs.
        nll: mean negative log likelihood of a token, nats.
        low: lower end of its 95 % interval over documents; None with a single document.
        high: upper end.
        spread: standard deviation of nll over seeds; None with one.
        least: smallest nll of any seed.
        most: largest nll of any seed.
        rise: paired difference to the unchanged model; None with a single document.
        against_random: paired difference to the mean of the random runs; None without any.
        against_frequency: paired difference to pruning by frequency.
        removed: 1 - rise / rise of random: 1 costs nothing, 0 is as bad as chance; None where random's rise does not
            show, or for random itself.
        reconstruction: mean over layers and seeds.
        lost_tokens: mean over layers and seeds.
        seconds: to decide and to make new weights, mean over seeds.
        bytes: of the smaller checkpoint's weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    method: str
    seeds: int
    nll: float
    low: float | None
    high: float | None
    spread: float | None
    least: float
    most: float
    rise: PairedDifference | None
    against_random: PairedDifference | None
    against_frequency: PairedDifference | None
    removed: Share | None
    reconstruction: float
    lost_tokens: float
    seconds: float
    bytes: int


class Ranking(BaseModel):
    """All methods at one budget, best first.

    Attributes:
        keep: the budget.
        calibration: the text they decided from: "all" or a domain.
        text: what they were measured on: "all", a domain, or "not " and a domain.
        unchanged: nll of the unchanged model there.
        documents: held-out documents, or passages of them, there.
        rows: by nll.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: Keep
    calibration: str
    text: str
    unchanged: float
    documents: int
    rows: tuple[RankRow, ...]

    def row(self, name: str) -> RankRow | None:
        """The row of a method, if it took part."""
        return next((row for row in self.rows if row.name == name), None)


class PruneBenchResult(BaseModel):
    """All pruning methods on one model and text.

    Attributes:
        format: version of this file.
        model: what was pruned, for people.
        fingerprint: of it.
        experts: decoder layer -> E.
        top_k: choices a token makes.
        bytes: of its weights.
        setting: what was asked for.
        source: where the text came from.
        text: digest of what methods decided from and were measured on.
        dtype: of the weights in memory.
        calibrations: the texts that methods decided from.
        calibration_seconds: of the one pass that took all statistics.
        unchanged: likelihood of each held-out document, or passage of one, under the unchanged model.
        cuts: held-out domains whose documents were cut into passages, which make their intervals too narrow.
        runs: all that was measured.
        rankings: at each budget, calibration and text.
        skipped: methods that took no part.
        seconds: of the last call, in all; the others' runs joined it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    model: str
    fingerprint: str
    experts: dict[int, int]
    top_k: int
    bytes: int
    setting: PruneBenchSetting
    source: str = ""
    text: str = ""
    dtype: str = ""
    calibrations: tuple[CalibrationDraw, ...]
    calibration_seconds: float
    unchanged: PerplexityResult
    cuts: tuple[Cut, ...] = ()
    runs: tuple[PruneRun, ...]
    rankings: tuple[Ranking, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seconds: float = Field(default=0.0, ge=0)

    def ranking(self, keep: Keep, calibration: str = ALL, text: str = ALL) -> Ranking | None:
        """One of the rankings, if it was made."""
        found = (r for r in self.rankings if same_keep(r.keep, keep))
        return next((r for r in found if (r.calibration, r.text) == (calibration, text)), None)

    def select(self, name: str, keep: Keep, calibration: str = ALL) -> tuple[PruneRun, ...]:
        """Runs of one method at one budget, a run for each seed."""
        found = (run for run in self.runs if same_keep(run.keep, keep))
        return tuple(run for run in found if (run.name, run.calibration) == (name, calibration))

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        atomic_write(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PruneBenchResult:
        """Read what `save` wrote.

        Raises:
            BadData: missing, damaged or something else.
        """
        hint = "`moekit bench prune` writes one"
        return parse_file(cls, path, what="result of a pruning bench", missing=hint, hint=hint, limit=MAX_BYTES)
