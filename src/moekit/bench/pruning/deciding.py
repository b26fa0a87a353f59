"""What every method would keep: one walk over the layers, weights read once for all methods that look at them.

Legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from moekit._files import read_text
from moekit._progress import Progress, track
from moekit.anatomy.probe import Geometry
from moekit.bench.pruning.calibration import Calibrated, Subject
from moekit.bench.pruning.result import Skipped
from moekit.bench.pruning.setting import Entry, Keep, PruneBenchSetting
from moekit.checkpoint.atomic import atomic_write
from moekit.compress.budget.sizes import Budget, ByteSizes, uniform_count
from moekit.compress.engine.dropping import FewerMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.measuring import geometries_of, sizes_of, weights_reader
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.rewriting import novices_by_layer
from moekit.compress.engine.searching import plan_by_search
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, MoekitError
from moekit.trace.statistics import LayerStatistics
from moekit.trace.store import Trace
from moekit.trace.streamed import Streamed

Decisions = dict[int, LayerOutcome]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One method at one budget with one seed, decided.

    Attributes:
        entry: the method as it was asked for.
        method: the method.
        keep: the budget.
        seed: of everything random.
        calibration: name of the text it decided from.
        trace: digest of that text's statistics.
        outcomes: decoder layer -> what stays.
        statistics: decoder layer -> what it decided from.
        geometries: decoder layer -> sizes.
        seconds: it took to decide.
    """

    entry: Entry
    method: FewerMethod
    keep: Keep
    seed: int
    calibration: str
    trace: str
    outcomes: Decisions
    statistics: Mapping[int, LayerStatistics]
    geometries: Mapping[int, Geometry]
    seconds: float

    @property
    def key(self) -> str:
        """Equal for candidates that make the same model."""
        told: list[object] = [[layer, outcome.keep] for layer, outcome in self.outcomes.items()]
        if self.method.rewrites or self.method.redirects:
            whole = [outcome.model_dump(mode="json", exclude={"figures"}) for outcome in self.outcomes.values()]
            told += [self.entry.method, self.method.model_dump(mode="json"), self.seed, self.trace, whole]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    @property
    def novices(self) -> dict[int, Tensor]:
        """Decoder layer -> constants that answer for experts whose tokens go to nobody."""

        def inputs(layer: int) -> LayerInputs:
            return LayerInputs(layer, self.geometries[layer], self.statistics[layer], None, self.seed)

        return novices_by_layer(self.method, self.outcomes, inputs)

    def rewritten(self, layer: int, weights: LayerWeights) -> tuple[LayerWeights, dict[str, float]]:
        """The weights of what stays at one layer, and what the method tells of making them."""
        outcome = self.outcomes[layer]
        if len(outcome.keep) == weights.experts:
            return weights.select(outcome.keep), {}
        own = LayerInputs(layer, self.geometries[layer], self.statistics[layer], lambda: weights, self.seed)
        made = self.method.transform(weights, outcome, own)
        told = getattr(self.method, "figures", None)
        return made, {} if told is None else dict(told(weights, outcome, own))

    @property
    def figures(self) -> dict[str, float]:
        """What the outcomes tell, means over layers."""
        return mean_figures([outcome.figures for outcome in self.outcomes.values()])


def mean_figures(layers: Sequence[Mapping[str, float | list[float]]]) -> dict[str, float]:
    """Means over layers of the figures that every layer tells and that are plain numbers."""
    names = [name for name, value in layers[0].items() if not isinstance(value, list)] if layers else []
    found: dict[str, float] = {}
    for name in names:
        values = [told[name] for told in layers if name in told]
        if len(values) == len(layers):
            found[name] = statistics.fmean(float(value) for value in values if not isinstance(value, list))
    return found


class _Watched(LayerInputs):
    """Evidence that notes whether numbers were drawn."""

    def generator(self, purpose: str = "") -> object:  # type: ignore[override]
        self.__dict__["drew"] = True
        return super().generator(purpose)

    @property
    def drawn(self) -> bool:
        return "drew" in self.__dict__


@dataclass(eq=False)
class _Job:
    """One method and one text."""

    entry: Entry
    method: FewerMethod
    calibration: str
    trace: Trace
    digest: str
    statistics: Mapping[int, LayerStatistics]
    seeds: tuple[int, ...]
    random: bool = False
    seconds: float = 0.0
    outcomes: dict[tuple[int, str], Decisions] = field(default_factory=dict)


def _behind_itself(method: str) -> BadConfig:
    """Why a method is left out that decides each layer on what the changed ones before it give."""
    return BadConfig(
        f"{method} decides each layer behind the layers that it has changed, and here all decide on one pass over the "
        "model as it is",
        hint=f"let it decide on that pass, too, if it can (--set {method}.mode=layerwise), or see its own proof",
    )


class Decider:
    """Lets all methods decide.

    Args:
        subject: what is to be pruned.
        setting: methods, budgets, seeds.

    Raises:
        BadConfig: a budget is impossible, an unknown method, or knobs it refuses.
    """

    def __init__(self, subject: Subject, setting: PruneBenchSetting) -> None:
        self.subject = subject
        self.setting = setting
        self.geometries = geometries_of(subject.checkpoint)
        self.sizes: ByteSizes = sizes_of(subject.checkpoint, self.geometries, setting.top_k)
        self.counts = {str(keep): uniform_count(Budget(keep=keep), self.sizes) for keep in setting.keep}
        largest = max(self.geometries.values(), key=lambda geometry: geometry.experts)
        self.methods = [(entry, entry.make(largest)) for entry in setting.entries]
        self.skipped: list[Skipped] = []

    @property
    def statistics(self) -> tuple[str, ...]:
        """All that any method needs, and the load, which tells what was never routed."""
        needed = {name for _, method in self.methods for name in method.required}
        return tuple(sorted({"load", *needed}))

    def decide(self, calibrated: Calibrated, folder: Path, progress: Progress | None = None) -> list[Candidate]:
        """Decide for all methods, texts, budgets and seeds.

        A method that fails for a reason of its own is left out and told of in `skipped`.
        """
        jobs = []
        for name, trace in calibrated.traces.items():
            digest = trace.digest
            for entry, method in self.methods:
                seeds = tuple(range(self.setting.seed, self.setting.seed + (entry.seeds or self.setting.seeds)))
                jobs.append(_Job(entry, method, name, trace, digest, trace.require(method.required), seeds))
        for job in [job for job in jobs if job.method.passes == "sequential"]:
            self._skip(job, _behind_itself(job.entry.method))
            jobs.remove(job)
        found = self._score([job for job in jobs if not job.method.searches], progress)
        for job in jobs:
            if job.method.searches:
                found += self._search(job, calibrated, folder, progress)
        order = {entry.name: number for number, entry in enumerate(self.setting.entries)}
        return sorted(found, key=lambda c: order[c.entry.name])

    def _score(self, jobs: list[_Job], progress: Progress | None) -> list[Candidate]:
        read = weights_reader(self.subject.checkpoint) if any(job.method.reads_weights for job in jobs) else None
        for layer in track(list(self.geometries), "deciding", progress):
            weights = None if read is None else read(layer)
            for job in list(jobs):
                start = time.perf_counter()
                try:
                    self._layer(job, layer, weights)
                except MoekitError as error:
                    self._skip(job, error)
                    jobs.remove(job)
                job.seconds += time.perf_counter() - start
        return [candidate for job in jobs for candidate in self._candidates(job)]

    def _layer(self, job: _Job, layer: int, weights: LayerWeights | None) -> None:
        first, drawn = self._decide_layer(job, layer, job.seeds[0], weights)
        job.random |= drawn
        for seed in job.seeds:
            again = drawn and seed != job.seeds[0]
            made = self._decide_layer(job, layer, seed, weights)[0] if again else first
            for keep, outcome in made.items():
                job.outcomes.setdefault((seed, keep), {})[layer] = outcome

    def _decide_layer(
        self, job: _Job, layer: int, seed: int, weights: LayerWeights | None
    ) -> tuple[dict[str, LayerOutcome], bool]:
        read = (lambda: weights) if weights is not None and job.method.reads_weights else None
        inputs = _Watched(layer, self.geometries[layer], job.statistics[layer], read, seed)
        scores_E = job.method.score(inputs)
        made = {keep: job.method.decide(inputs, scores_E, counts[layer]) for keep, counts in self.counts.items()}
        return made, inputs.drawn

    def _candidates(self, job: _Job) -> list[Candidate]:
        seeds = job.seeds if job.random or job.entry.seeds is not None else job.seeds[:1]
        each = job.seconds / (len(job.seeds if job.random else seeds[:1]) * len(self.setting.keep))
        return [
            Candidate(
                job.entry,
                job.method,
                keep,
                seed,
                job.calibration,
                job.digest,
                job.outcomes[seed, str(keep)],
                job.statistics,
                self.geometries,
                each,
            )
            for keep in self.setting.keep
            for seed in seeds
        ]

    def _search(self, job: _Job, calibrated: Calibrated, folder: Path, progress: Progress | None) -> list[Candidate]:
        found = []
        try:
            with calibrated.searched(job.calibration, self.subject, self.setting) as streamed:
                for keep in self.setting.keep:
                    made, seconds = self._searched(job, keep, streamed, folder, progress)
                    found.append(
                        Candidate(
                            job.entry,
                            job.method,
                            keep,
                            job.seeds[0],
                            job.calibration,
                            job.digest,
                            made,
                            job.trace.require(("load", *job.method.required)),
                            self.geometries,
                            seconds,
                        )
                    )
        except MoekitError as error:
            self._skip(job, error)
            return []
        return found

    def _searched(
        self, job: _Job, keep: Keep, streamed: Streamed, folder: Path, progress: Progress | None
    ) -> tuple[Decisions, float]:
        """What a search decided, now or in an earlier call."""
        setting = self.setting
        told = [job.entry.method, job.method.model_dump(mode="json"), str(keep), job.seeds[0], job.digest]
        told += [setting.search_tokens, setting.top_k, str(self.subject.dtype)]
        file = folder / f"search-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"
        if file.is_file():
            noted = json.loads(read_text(file))
            kept = {int(layer): LayerOutcome.model_validate(d) for layer, d in noted["outcomes"].items()}
            return kept, float(noted["seconds"])
        start = time.perf_counter()
        request = PlanRequest(job.method, Budget(keep=keep), setting.top_k, seed=job.seeds[0])
        outcomes = plan_by_search(self.subject.checkpoint, job.trace, streamed, request, progress).outcomes
        seconds = time.perf_counter() - start
        dumped = {layer: outcome.model_dump(mode="json") for layer, outcome in outcomes.items()}
        atomic_write(file, json.dumps({"outcomes": dumped, "seconds": seconds}))
        return outcomes, seconds

    def _skip(self, job: _Job, error: MoekitError) -> None:
        self.skipped.append(Skipped(name=job.entry.name, calibration=job.calibration, reason=str(error)))
