"""All pruning methods on one model and text, with one pass for their statistics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from moekit._progress import Progress
from moekit.bench.pruning.calibration import Subject, calibrate
from moekit.bench.pruning.deciding import Candidate, Decider
from moekit.bench.pruning.folder import mark
from moekit.bench.pruning.joining import check_joins, dtype_name, joined, text_digest
from moekit.bench.pruning.measuring import Measuring
from moekit.bench.pruning.ranking import all_rankings
from moekit.bench.pruning.result import PruneBenchResult, PruneRun
from moekit.bench.pruning.setting import PruneBenchSetting
from moekit.bench.pruning.text import count
from moekit.data.batches import TokenizedDocument


def bench_pruning(
    subject: Subject,
    calibration: Sequence[TokenizedDocument],
    heldout: Sequence[TokenizedDocument],
    setting: PruneBenchSetting,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    earlier: PruneBenchResult | None = None,
) -> PruneBenchResult:
    """Prune one model by all methods, at all budgets and with all seeds, and measure what each costs.

    Nothing is written but results: variants are measured side by side while the checkpoint is read layer by layer.
    What was measured is kept in `folder`, so that a run that was ended goes on, and another method joins later.

    Args:
        subject: what is pruned.
        calibration: tokenized documents that methods decide from.
        heldout: tokenized documents that they are measured on.
        setting: methods, budgets, seeds, tasks.
        folder: where statistics and results are kept.
        progress: told layer by layer.
        earlier: what earlier calls found; its runs join the result.

    Raises:
        BadConfig: an impossible budget, an unknown method, knobs it refuses, or `earlier` is of another model, text or
            setting.
        BadData: a text is empty or lacks a task's domain.
        UnsupportedModel: no MoE, or weights quantized in a way that is not read here.
    """
    start = time.perf_counter()
    folder, text, dtype = Path(folder), text_digest(calibration, heldout), dtype_name(subject.dtype)
    if earlier is not None:
        fingerprint = subject.checkpoint.fingerprint
        check_joins(earlier, fingerprint=fingerprint, text=text, dtype=dtype, setting=setting, folder=folder)
    mark(folder)
    decider = Decider(subject, setting)
    calibrated = calibrate(subject, calibration, setting, decider.statistics, folder, progress)
    candidates = decider.decide(calibrated, folder, progress)
    measuring = Measuring(subject, heldout, setting, decider.sizes, folder)
    unchanged = measuring.run(candidates, progress)
    checkpoint, sizes = subject.checkpoint, decider.sizes
    result = PruneBenchResult(
        model=str(checkpoint.path),
        fingerprint=checkpoint.fingerprint,
        experts=dict(sizes.experts),
        top_k=sizes.top_k,
        bytes=checkpoint.nbytes,
        setting=setting,
        source=subject.text,
        text=text,
        dtype=dtype,
        calibrations=tuple(calibrated.describe(name) for name in calibrated.traces),
        calibration_seconds=calibrated.seconds,
        unchanged=unchanged,
        cuts=tuple(cut for cut in count(heldout) if cut.is_cut),
        runs=_runs(candidates, measuring, decider),
        skipped=(*decider.skipped, *measuring.skipped),
    )
    result = result if earlier is None else joined(earlier, result)
    rankings = all_rankings(result)
    return result.model_copy(update={"rankings": rankings, "seconds": time.perf_counter() - start})


def _runs(candidates: Sequence[Candidate], measuring: Measuring, decider: Decider) -> tuple[PruneRun, ...]:
    sizes = decider.sizes
    runs = []
    for candidate in candidates:
        measured = measuring.found.get(candidate.key)
        if measured is None:
            continue
        routed = sum(sizes.expert_bytes[layer] * count for layer, count in measured.result.experts.items())
        runs.append(
            PruneRun(
                name=candidate.entry.name,
                method=candidate.entry.method,
                settings=candidate.method.model_dump(mode="json"),
                keep=candidate.keep,
                seed=candidate.seed,
                calibration=candidate.calibration,
                perplexity=measured.result.perplexity.model_copy(update={"model": candidate.entry.name}),
                experts=measured.result.experts,
                reconstruction=measured.result.reconstruction,
                lost_tokens=measured.result.lost_tokens,
                lost_choices=measured.result.lost_choices,
                bytes=sizes.other_bytes + routed,
                decide_seconds=candidate.seconds,
                rewrite_seconds=measured.rewrite_seconds,
                figures=candidate.figures | measured.figures,
            )
        )
    return tuple(runs)
