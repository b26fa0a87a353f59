"""Statistics for all methods and all texts out of one pass: every token goes through the model once.

Where methods are also to decide from single domains, each of those is walked on its own, then the rest; the statistics
of the whole text are their sum.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moekit._files import read_text
from moekit._progress import Progress
from moekit.bench.pruning.result import ALL, CalibrationDraw, Cut
from moekit.bench.pruning.setting import PruneBenchSetting
from moekit.bench.pruning.text import count
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.folder import Checkpoint
from moekit.data.batches import TokenBatches, TokenizedDocument, arrange
from moekit.errors import BadData
from moekit.trace.store import Trace
from moekit.trace.streamed import Streamed, record_streamed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint and how its layers are read.

    Attributes:
        checkpoint: opened and verified.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        tokenizer: for the account of the text.
        text: where the text came from.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype | None = None
    device: str = "auto"
    tokenizer: PreTrainedTokenizerBase | None = None
    text: str = ""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What methods decide from.

    Attributes:
        traces: "all", and each task's domain -> statistics.
        cuts: domain -> how many documents its text is of.
        rows: the same names -> the text itself, for methods that decide by trying.
        seconds: of the pass, whenever it was made.
    """

    traces: Mapping[str, Trace]
    cuts: Mapping[str, Cut]
    rows: Mapping[str, TokenBatches]
    seconds: float

    def describe(self, name: str) -> CalibrationDraw:
        """One of the texts, for the result."""
        trace = self.traces[name]
        domains: dict[str, int] = {}
        for entry in trace.meta.data:
            domains[entry.domain] = domains.get(entry.domain, 0) + entry.tokens
        cuts = [self.cuts[domain] for domain in domains]
        statistics = trace.require(("load",))
        return CalibrationDraw(
            name=name,
            domains=domains,
            documents=sum(cut.documents for cut in cuts),
            passages=sum(cut.passages for cut in cuts) if any(cut.is_cut for cut in cuts) else None,
            never_routed={layer: len(statistics[layer].never_routed) for layer in statistics},
        )

    def searched(self, name: str, subject: Subject, setting: PruneBenchSetting) -> Streamed:
        """The rows that searching methods try, evenly from the whole text, ready to be walked."""
        rows = self.rows[name]
        count = min(len(rows), max(1, setting.search_tokens // rows.input_ids.shape[1]))
        chosen = torch.linspace(0, len(rows) - 1, count).round().long()
        some = TokenBatches(rows.input_ids[chosen], rows.document_RS[chosen], rows.domain_RS[chosen], rows.domains)
        batches = some.batches(setting.batch_size)
        return Streamed(subject.checkpoint, batches, statistics=("load",), dtype=subject.dtype, device=subject.device)


def calibrate(
    subject: Subject,
    documents: Sequence[TokenizedDocument],
    setting: PruneBenchSetting,
    statistics: Sequence[str],
    folder: Path,
    progress: Progress | None = None,
) -> Calibrated:
    """Take all statistics, or read those of an earlier call of the same work.

    Args:
        subject: what is to be pruned.
        documents: the calibration text.
        setting: its tasks, and sizes of rows and batches.
        statistics: all that any method needs.
        folder: where states and statistics are kept.
        progress: told layer by layer.

    Raises:
        BadData: a task's domain is not in the text.
    """
    by_domain: dict[str, list[TokenizedDocument]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    if missing := [name for name in setting.domains if name not in by_domain]:
        raise BadData(f"the calibration text has no domain {', '.join(missing)}", hint=f"it has {', '.join(by_domain)}")
    rest = [name for name in by_domain if name not in setting.domains]
    parts = [(name,) for name in setting.domains] + ([tuple(rest)] if rest else [])
    rows = {part: arrange([d for name in part for d in by_domain[name]], setting.seq_len) for part in parts}
    found = {part: _record(subject, rows[part], setting, statistics, folder, progress) for part in parts}
    traces = {name: found[name,][0] for name in setting.domains}
    traces = {ALL: Trace.merge([trace for trace, _ in found.values()]), **traces}
    everything = arrange([d for part in parts for name in part for d in by_domain[name]], setting.seq_len)
    texts = {ALL: everything, **{name: rows[name,] for name in setting.domains}}
    cuts = {cut.domain: cut for cut in count(documents)}
    return Calibrated(traces, cuts, texts, sum(seconds for _, seconds in found.values()))


def _record(
    subject: Subject,
    rows: TokenBatches,
    setting: PruneBenchSetting,
    statistics: Sequence[str],
    folder: Path,
    progress: Progress | None,
) -> tuple[Trace, float]:
    key = _key(subject, rows, setting, statistics)
    kept, told, scratch = (folder / name for name in (f"trace-{key}", f"trace-{key}.json", f"states-{key}"))
    if told.is_file():
        return Trace.load(kept), float(json.loads(read_text(told))["seconds"])
    start = time.perf_counter()
    trace = record_streamed(
        subject.checkpoint,
        rows.batches(setting.batch_size),
        statistics=statistics,
        folder=scratch,
        dtype=subject.dtype,
        device=subject.device,
        tokenizer=subject.tokenizer,
        source=subject.text,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    trace.save(kept, overwrite=True)
    atomic_write(told, json.dumps({"seconds": seconds}))
    shutil.rmtree(scratch, ignore_errors=True)
    return trace, seconds


def _key(subject: Subject, rows: TokenBatches, setting: PruneBenchSetting, statistics: Sequence[str]) -> str:
    digest = hashlib.sha256(subject.checkpoint.fingerprint.encode())
    digest.update(json.dumps([sorted(statistics), setting.batch_size, str(subject.dtype), rows.domains]).encode())
    for tensor in (rows.input_ids, rows.document_RS, rows.domain_RS):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
