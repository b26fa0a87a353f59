"""`use: pattern`: what each task wants of every layer's experts, added to a folder of patterns."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moekit import catalogue
from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName, named_dtype, resolve_device
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import model_item, read_text, text_item
from moekit.jobs.shared.opened import Source, open_source
from moekit.jobs.shared.pruning import bytes_between, check_disk
from moekit.jobs.shared.task_texts import account, largest_layer, texts_of_tasks, warn_of
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    import torch

    from moekit.compress.engine.dropping import PruneMethod
    from moekit.data import TokenizedDocument
    from moekit.jobs.shared.task_texts import Texts
    from moekit.serving.expert_sets.expert_set import Pattern
    from moekit.serving.expert_sets.store import PatternStore
    from moekit.trace.statistics import LayerStatistics

logger = logging.getLogger(__name__)

_STORE_BYTES = 1 << 20
# The method whose scores are means over all tokens, so that those of several tasks add up.
_MEANS = "premoe"


class PatternStep(Step):
    """Record what the routers make of a task's text, and keep the ranks of all experts: one pattern for each task."""

    use: Literal["pattern"] = "pattern"
    model: ModelRef = Field(description="MoE: folder or hub id")
    data: TextRef = Field(description="text of the task, or of several, each a domain of it")
    task: str | None = Field(
        default=None, min_length=1, description="name of the task; without it each domain of data is a task"
    )
    method: str = Field(default="premoe", description="what scores the experts; see moekit methods prune")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own knobs")
    generalist: bool = Field(default=False, description="also store a pattern of all tasks of the folder together")
    further: bool = Field(
        default=True,
        description="keep the scores of all layers: without them prompts are compared at the first alone, and tasks "
        "cannot be pooled later",
    )
    existing: Literal["anew", "add", "replace"] = Field(
        default="anew",
        description="patterns that the folder holds: make it anew, add to them, or replace tasks of the same name too",
    )
    max_tokens: int | None = Field(
        default=65536, ge=1, description="tokens of each task, at most, shared among its documents"
    )
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    def identity(self) -> dict[str, Any]:
        """What is done with patterns that are there already does not change what is recorded."""
        return {key: value for key, value in super().identity().items() if key != "existing"}

    def check(self) -> None:
        """Refuse an unknown method, one that gives no ranks, and a task of the generalist's name."""
        resolve_device(self.device)
        from moekit.serving.expert_sets.expert_set import GENERALIST
        from moekit.serving.expert_sets.scoring import check_method

        check_method(catalogue.make("prune", self.method, self.settings))
        if self.task == GENERALIST:
            raise BadConfig(
                f"{GENERALIST!r} is the name of all tasks together", hint="choose another one, or --generalist"
            )
        if self.generalist and not self.further:
            raise BadConfig("tasks cannot be pooled without the scores of all layers", hint="leave --no-further out")

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """A few hundred kilobytes are written; what lies on the disk meanwhile are the text's hidden states."""
        reads = (model_item(self.model, sizes), text_item(self.data, sizes))
        notes = ("layers are read from disk one at a time: memory does not grow with their number",)
        if not (Path(self.model).expanduser() / "config.json").is_file():
            return Forecast(reads, (Item(str(out), _STORE_BYTES),), notes=notes)
        source = open_source(self.model)
        disk = _STORE_BYTES + self._between(source)
        return Forecast(
            reads, (Item(str(out), _STORE_BYTES),), disk=disk, memory=2 * largest_layer(source) + (1 << 30), notes=notes
        )

    def run(self, work: JobContext) -> dict[str, Any]:
        """Refuse what is impossible, record, rank, store."""
        from moekit.serving.expert_sets.expert_set import GENERALIST

        self.check()
        source = open_source(self.model, work.progress)
        method = catalogue.make("prune", self.method, self.settings)
        texts = self._texts(source, work)
        self._refuse_known(work.out, source, method, texts)
        check_disk(work.out, work.scratch, _STORE_BYTES, self._between(source, len(texts)))
        found = self._record(source, method, texts, work)
        made = [self._pattern(name, found[name], texts[name], method, source) for name in texts]
        if self.generalist:
            store = self._store_before(work.out, source)
            known = {} if store is None else store.load_all()
            rest = [p for name, p in known.items() if name != GENERALIST and name not in texts]
            made.append(self._pooled(source, method, found, texts, [*rest, *made]))
        self._store(made, source, work)
        return self._told(made, source, work)

    @property
    def _dtype(self) -> torch.dtype | None:
        return named_dtype(self.dtype)

    def _between(self, source: Source, tasks: int = 1) -> int:
        return bytes_between(source, tasks * (self.max_tokens or (1 << 20)), 0, 0, 0)

    def _texts(self, source: Source, work: JobContext) -> Texts:
        """Task -> its documents; read before any work, as one may turn out empty."""
        documents = read_text(self.data, seed=work.seed, progress=work.progress)
        return texts_of_tasks(documents, self.data, self.task, source.tokenizer(), self.max_tokens)

    def _store_before(self, out: Path, source: Source) -> PatternStore | None:
        """The folder that tasks are added to; None where there is none yet, or it is made anew."""
        from moekit.serving.expert_sets.store import INDEX_FILE, PatternStore

        if self.existing == "anew" or not (out / INDEX_FILE).is_file():
            return None
        return PatternStore(out, source.checkpoint.fingerprint)

    def _refuse_known(self, out: Path, source: Source, method: PruneMethod, tasks: Collection[str]) -> None:
        """Refuse before any work what could not be stored after it."""
        from moekit.serving.expert_sets.expert_set import GENERALIST

        store = self._store_before(out, source)
        if store is None:
            return
        index = store.index()
        if (index.origin.method, index.origin.knobs) != (self.method, method.model_dump(mode="json")):
            raise BadConfig(
                f"the patterns here were made by {index.origin.method} with {index.origin.knobs}",
                file=out,
                hint="use the same method and knobs, or another folder",
            )
        twice = [name for name in tasks if name in index.tasks]
        if twice and self.existing == "add":
            raise BadConfig(
                f"there are patterns of {', '.join(map(repr, twice))} already",
                file=out,
                hint="say --overwrite to replace them, or choose another name (--task)",
            )
        rest = [name for name in index.tasks if name not in tasks and name != GENERALIST]
        if self.generalist and rest and self.method != _MEANS:
            raise BadConfig(
                f"scores of {self.method} are no means over tokens, so those of tasks stored before "
                f"({', '.join(rest)}) cannot be pooled",
                file=out,
                hint="give all tasks in one call, each a domain of the data, or leave --generalist out",
            )

    def _record(
        self, source: Source, method: PruneMethod, texts: Texts, work: JobContext
    ) -> dict[str, dict[int, LayerStatistics]]:
        """One pass: every layer is read once, and all tasks go through it."""
        from moekit.data.batches import arrange
        from moekit.serving.expert_sets.recording import GroupedText

        length = min(self.seq_len, source.longest)
        batches: dict[str, list[Any]] = {
            name: list(arrange(text, length).batches(self.batch_size)) for name, text in texts.items()
        }
        if self.task is None:
            # A task of one domain is scored as a prompt is: methods that weigh domains see a single one.
            batches = {
                name: [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in some]
                for name, some in batches.items()
            }
        reading = GroupedText(
            source.checkpoint,
            batches,
            statistics=(*method.required, "load"),
            folder=work.scratch / "calibration",
            dtype=self._dtype,
            device=self.device,
        )
        return reading.run(work.progress)

    def _pattern(
        self,
        name: str,
        statistics: dict[int, LayerStatistics],
        text: list[TokenizedDocument],
        method: PruneMethod,
        source: Source,
    ) -> Pattern:
        from moekit.serving.expert_sets.scoring import from_statistics

        return from_statistics(
            name,
            statistics,
            source.geometries,
            method,
            data=account(self.data, text),
            fingerprint=source.checkpoint.fingerprint,
            further=self.further,
        )

    def _pooled(
        self,
        source: Source,
        method: PruneMethod,
        found: dict[str, dict[int, LayerStatistics]],
        texts: Texts,
        others: list[Pattern],
    ) -> Pattern:
        """The pattern of all tasks: PreMoe's means over tokens add up, of other methods the statistics do."""
        from moekit.serving.expert_sets.expert_set import GENERALIST, generalist

        if self.method == _MEANS:
            return generalist(others)
        merged: dict[int, LayerStatistics] = {}
        for statistics in found.values():
            merged = {n: s if n not in merged else merged[n].merge(s) for n, s in statistics.items()}
        text = [document for some in texts.values() for document in some]
        return self._pattern(GENERALIST, merged, text, method, source)

    def _store(self, patterns: list[Pattern], source: Source, work: JobContext) -> None:
        from moekit.checkpoint import atomic_folder
        from moekit.serving.expert_sets.expert_set import GENERALIST
        from moekit.serving.expert_sets.store import PatternStore

        fingerprint = source.checkpoint.fingerprint
        if self.existing == "anew":
            with atomic_folder(work.out, overwrite=work.overwrite) as folder:
                PatternStore(folder, fingerprint).save_all(patterns)
            return
        names = [pattern.task for pattern in patterns] if self.existing == "replace" else [GENERALIST]
        PatternStore(work.out, fingerprint).save_all(patterns, overwrite=names)

    def _told(self, patterns: list[Pattern], source: Source, work: JobContext) -> dict[str, Any]:
        from moekit.serving.expert_sets.expert_set import GENERALIST
        from moekit.serving.expert_sets.store import PatternStore

        index = PatternStore(work.out, source.checkpoint.fingerprint).index()
        if GENERALIST in index.tasks and not self.generalist:
            logger.warning("the generalist is still that of the tasks before: --generalist makes it anew")
        for pattern in patterns:
            warn_of(pattern)
        made = [
            {
                "task": pattern.task,
                "tokens": pattern.tokens,
                "documents": sum(entry.documents for entry in pattern.data),
                "never_routed": {str(n): experts for n, experts in pattern.never_routed.items() if experts},
                "bytes": (work.out / index.tasks[pattern.task].file).stat().st_size,
            }
            for pattern in patterns
        ]
        origin = index.origin
        told = {"method": self.method, "settings": origin.knobs, "experts": origin.experts}
        return {**told, "layers": list(origin.layers), "made": made, "tasks": list(index.tasks)}
