"""What candidates cost on held-out text: as many side by side as memory allows, each kept once it is measured."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moekit._files import read_bytes
from moekit._progress import Progress
from moekit._validation import parse
from moekit.bench.pruning.calibration import Subject
from moekit.bench.pruning.deciding import Candidate, mean_figures
from moekit.bench.pruning.result import Skipped
from moekit.bench.pruning.setting import PruneBenchSetting
from moekit.checkpoint.atomic import atomic_write
from moekit.compress.budget.sizes import ByteSizes
from moekit.compress.weights import LayerWeights
from moekit.data.batches import TokenizedDocument
from moekit.errors import MoekitError
from moekit.evaluation.changes import Variant
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.variants import VariantResult, compare_variants

# More at a time read the checkpoint fewer times, fewer lose less when a run is ended.
MOST_TOGETHER = 16


class Measured(BaseModel):
    """A candidate's result, as it is kept.

    Attributes:
        result: what it costs.
        rewrite_seconds: to make its new weights.
        figures: what the method tells of making them, means over layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    result: VariantResult
    rewrite_seconds: float
    figures: dict[str, float] = {}


class Measuring:
    """Measures candidates, each model once, whoever asks for it.

    Args:
        subject: what is pruned.
        heldout: tokenized held-out documents.
        setting: window, choices, memory.
        sizes: of experts.
        folder: where results are kept.
    """

    def __init__(
        self,
        subject: Subject,
        heldout: Sequence[TokenizedDocument],
        setting: PruneBenchSetting,
        sizes: ByteSizes,
        folder: Path,
    ) -> None:
        self.subject = subject
        self.heldout = list(heldout)
        self.setting = setting
        self.sizes = sizes
        self.folder = folder / f"measured-{self._context()}"
        self.found: dict[str, Measured] = {}
        self.skipped: list[Skipped] = []
        self._seconds: dict[str, float] = {}
        self._told: dict[str, list[dict[str, float]]] = {}

    def run(self, candidates: Sequence[Candidate], progress: Progress | None = None) -> PerplexityResult:
        """Measure what was not measured before; results lie in `found`, by key.

        Returns:
            Likelihoods of the unchanged model.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        distinct = {candidate.key: candidate for candidate in candidates}
        self.found |= {key: kept for key in distinct if (kept := self._kept(key)) is not None}
        missing = [candidate for key, candidate in distinct.items() if key not in self.found]
        for group in self._groups(missing):
            self._measure(group, progress)
        return self._unchanged(progress)

    def _measure(self, group: Sequence[Candidate], progress: Progress | None) -> None:
        try:
            results = self._compare(group, progress)
        except MoekitError as error:
            if len(group) == 1:
                [alone] = group
                reason = Skipped(name=alone.entry.name, calibration=alone.calibration, reason=str(error))
                self.skipped += [reason] if reason not in self.skipped else []
                return
            for candidate in group:
                self._measure([candidate], progress)
            return
        for candidate, result in zip(group, results, strict=True):
            seconds, told = self._seconds.get(candidate.key, 0.0), self._told.get(candidate.key, [])
            measured = Measured(result=result, rewrite_seconds=seconds, figures=mean_figures(told))
            self.found[candidate.key] = measured
            atomic_write(self.folder / f"{candidate.key}.json", measured.model_dump_json())

    def _compare(self, group: Sequence[Candidate], progress: Progress | None) -> list[VariantResult]:
        self._seconds, self._told = {}, {}
        unchanged, results = compare_variants(
            self.subject.checkpoint,
            self.heldout,
            [self._variant(candidate) for candidate in group],
            window=self.setting.window,
            limit=self.setting.memory_bytes // 2,
            dtype=self.subject.dtype,
            device=self.subject.device,
            progress=progress,
        )
        atomic_write(self.folder / "unchanged.json", unchanged.model_dump_json())
        return results

    def _variant(self, candidate: Candidate) -> Variant:
        def rewrite(layer: int, weights: LayerWeights) -> LayerWeights:
            start = time.perf_counter()
            made, told = candidate.rewritten(layer, weights)
            spent = time.perf_counter() - start
            self._seconds[candidate.key] = self._seconds.get(candidate.key, 0.0) + spent
            self._told.setdefault(candidate.key, []).append(told)
            return made

        own = rewrite if candidate.method.rewrites else None
        return Variant(candidate.key, candidate.outcomes, own, self.setting.top_k, novices=candidate.novices)

    def _unchanged(self, progress: Progress | None) -> PerplexityResult:
        file = self.folder / "unchanged.json"
        if not file.is_file():
            self._compare((), progress)
        return PerplexityResult.load(file)

    def _kept(self, key: str) -> Measured | None:
        file = self.folder / f"{key}.json"
        if not file.is_file():
            return None
        return parse(Measured, read_bytes(file), what="result", file=file, hint="delete it; it will be measured again")

    def _groups(self, candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
        """As many at a time as their changed layers leave room for."""
        group: list[Candidate] = []
        taken = 0
        for candidate in candidates:
            own = max(len(d.keep) * self.sizes.expert_bytes[layer] for layer, d in candidate.outcomes.items())
            if group and (len(group) == MOST_TOGETHER or taken + own > self.setting.memory_bytes // 2):
                yield group
                group, taken = [], 0
            group.append(candidate)
            taken += own
        if group:
            yield group

    def _context(self) -> str:
        """Names what results hold for: the model, the held-out text and how it is read."""
        setting = self.setting
        told = [setting.window, setting.top_k, str(self.subject.dtype)]
        digest = hashlib.sha256(self.subject.checkpoint.fingerprint.encode())
        digest.update(json.dumps([told, [[d.domain, list(d.ids)] for d in self.heldout]]).encode())
        return digest.hexdigest()[:16]
