"""What recipes cost on a text: statistics, gradients where the model fits in memory, and the table of costs."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit._device import named_dtype
from moekit._files import read_text
from moekit._memory import return_freed_memory
from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_write
from moekit.compress.engine.measuring import refuse_damaged
from moekit.compress.joint.composing import Composer
from moekit.compress.joint.costs import CostRow, CostTable, known_rows
from moekit.compress.joint.gradients import BlockGradients, block_gradients
from moekit.compress.joint.measuring import measure
from moekit.compress.joint.neurons import NeuronStore, see_neurons
from moekit.compress.joint.recipe import LayerRecipe
from moekit.data import Document
from moekit.errors import UnsupportedModel
from moekit.jobs.fitting.request import Asked, methods_of, room, whole_bytes
from moekit.jobs.options.fit import FitOptions
from moekit.jobs.shared.inputs import calibration_rows
from moekit.jobs.weights.plans import origin
from moekit.jobs.weights.self_calibration import load_for_answers
from moekit.trace.meta import TraceMeta
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed

logger = logging.getLogger(__name__)

# Copies of a row's logits in float32 while the loss is differentiated.
_LOGITS = 4


@dataclass(frozen=True)
class Priced:
    """What was measured of the layers.

    Attributes:
        table: costs of recipes.
        composer: the methods, with what was seen of the neurons.
        statistics: decoder layer -> what methods decide from.
        meta: of the text.
        why: why costs are no Fisher errors; "" where they are.
    """

    table: CostTable
    composer: Composer
    statistics: Mapping[int, LayerStatistics]
    meta: TraceMeta
    why: str


def price(
    options: FitOptions,
    asked: Asked,
    documents: list[Document],
    scratch: Path,
    *,
    seed: int,
    progress: Progress | None,
) -> Priced:
    """Run the text through the model layer by layer, and price every recipe of the menu that is not priced yet.

    Args:
        options: of the job.
        asked: model, menu and methods.
        documents: the text.
        scratch: for states and finished layers, so that an interrupted run goes on.
        seed: of sampled targets and random methods.
        progress: told layer by layer.

    Raises:
        BadConfig: stored costs of another model or text.
        UnsupportedModel: Fisher errors are asked for, and the model does not fit in memory.
    """
    source, tokenizer = asked.source, asked.source.tokenizer()
    rows = calibration_rows(
        documents,
        tokenizer,
        seq_len=min(options.seq_len, source.longest),
        max_tokens=options.max_tokens,
        bos=options.bos,
        pictures=source.pictures(documents),
    )
    with Streamed(
        source.checkpoint,
        list(rows.batches(options.batch_size)),
        statistics=asked.composer.required,
        folder=scratch / "calibration",
        dtype=named_dtype(options.dtype),
        device=options.device,
    ) as streamed:
        streamed.run(progress, refuse_damaged)
        meta = streamed.trace(
            tokenizer=tokenizer, source=origin(options.data, apart=options.heldout is None), seed=seed
        ).meta
        statistics = {layer: record.statistics for layer, record in streamed.records.items()}
        work = _Pricing(options, asked, streamed, statistics, meta, scratch, seed, progress)
        return work.run(why_no_gradients(options, asked, streamed))


@dataclass(frozen=True)
class _Pricing:
    options: FitOptions
    asked: Asked
    streamed: Streamed
    statistics: Mapping[int, LayerStatistics]
    meta: TraceMeta
    scratch: Path
    seed: int
    progress: Progress | None

    def run(self, why: str) -> Priced:
        """Costs; Fisher errors unless there is a reason why not."""
        options, geometries = self.options, self.asked.source.geometries
        if why and options.price == "fisher":
            raise UnsupportedModel(f"costs cannot be weighted by gradients: {why}", hint="say --price change, or auto")
        composer, layers = self._composer(not why)
        table = self._table(composer)
        wanted = {layer: self.asked.menu.of(g.experts, g.width) for layer, g in geometries.items()}
        missing = table.missing(wanted, fisher=not why)
        assert composer.neurons is not None
        unseen = [layer for layer in layers if layer not in composer.neurons]
        gradients = None
        try:
            if not why and (missing or unseen):
                try:
                    gradients = self._gradients(table)
                except UnsupportedModel as error:
                    if options.price == "fisher":
                        raise
                    return self.run(error.message)
            see_neurons(
                self.streamed, composer.narrow, composer.neurons, layers, gradients=gradients, progress=self.progress
            )
            if missing:
                table = table.with_rows(self._measured(composer, missing, gradients))
        finally:
            if gradients is not None:
                gradients.close()
        if options.costs is not None:
            atomic_write(Path(options.costs).expanduser(), table.model_dump_json(indent=1) + "\n")
        priced = table.in_changes() if why else table.in_nats()
        return Priced(priced, composer, self.statistics, self.meta, why)

    def _composer(self, gradients: bool) -> tuple[Composer, list[int]]:
        """The methods with a place for what is seen of neurons, and the layers whose neurons must be seen."""
        composer = methods_of(self.options, self.asked.sizes.group, gradients=gradients)
        narrow = composer.narrow
        key = json.dumps([narrow.model_dump(mode="json"), type(narrow).__name__, ids_hash(self.streamed), self.seed])
        folder = self.scratch / f"neurons-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        narrows = any(recipe.width is not None for recipe in self.asked.menu.recipes)
        layers = list(self.asked.source.geometries) if narrows else []
        return dataclasses.replace(composer, neurons=NeuronStore(folder)), layers

    def _table(self, composer: Composer) -> CostTable:
        """What is known already."""
        source = self.asked.source
        table = CostTable(
            model=source.parent,
            fingerprint=source.checkpoint.fingerprint,
            methods=composer.told,
            group=self.asked.sizes.group,
            seed=self.seed,
            tokens=self.streamed.tokens,
            ids_sha256=ids_hash(self.streamed),
        )
        return table if self.options.costs is None else known_rows(Path(self.options.costs).expanduser(), table)

    def _measured(
        self, composer: Composer, missing: Mapping[int, Sequence[LayerRecipe]], gradients: BlockGradients | None
    ) -> list[CostRow]:
        folder = self.scratch / "costs"
        folder.mkdir(parents=True, exist_ok=True)
        return measure(
            self.streamed,
            self.statistics,
            composer,
            missing,
            self.asked.sizes,
            gradients=gradients,
            seed=self.seed,
            folder=folder,
            progress=self.progress,
        )

    def _gradients(self, table: CostTable) -> BlockGradients:
        source, options, batches = self.asked.source, self.options, self.streamed.walk.batches
        folder = self.scratch / "gradients"
        folder.mkdir(parents=True, exist_ok=True)
        finished = folder / "finished.json"
        key = json.dumps([table.ids_sha256, table.seed, options.dtype])
        if finished.is_file() and read_text(finished) == key:
            return BlockGradients.opened(list(source.geometries), batches, self.streamed.walk.hidden, folder)
        finished.unlink(missing_ok=True)
        model: Any = load_for_answers(source, options.device, options.dtype).requires_grad_(False)
        made = block_gradients(model, batches, seed=table.seed, folder=folder, progress=self.progress)
        atomic_write(finished, key)
        del model
        gc.collect()
        return_freed_memory()
        return made


def why_no_gradients(options: FitOptions, asked: Asked, streamed: Streamed) -> str:
    """Why costs are not weighted by gradients; "" where they are."""
    if options.price == "change":
        return "as asked for"
    if asked.source.checkpoint.config.get("is_encoder_decoder"):
        return "the model has an encoder of its own"
    if any(batch.more is not None for batch in streamed.walk.batches):
        return "the text shows pictures"
    need, has = _needed(options, asked, streamed), room(options)
    if options.price == "auto" and has is not None and need > has:
        return f"the whole model needs {need:,} bytes of memory for one way back, and {has:,} are there"
    return ""


def _needed(options: FitOptions, asked: Asked, streamed: Streamed) -> int:
    """Bytes of the whole model, a row's activations, and its logits."""
    longest = max(batch.input_ids.shape[1] for batch in streamed.walk.batches)
    vocabulary = int(streamed.loader.model.get_input_embeddings().weight.shape[0])
    return whole_bytes(options, asked.source) + _LOGITS * 4 * longest * vocabulary


def ids_hash(streamed: Streamed) -> str:
    """sha256 of the token ids, their masks and domains."""
    digest = hashlib.sha256()
    parts: Sequence[Any] = streamed.walk.batches
    for batch in parts:
        digest.update(json.dumps(list(batch.input_ids.shape)).encode())
        digest.update(batch.input_ids.numpy().tobytes())
        digest.update(batch.attention_mask.numpy().tobytes())
    digest.update(json.dumps(list(streamed.domains)).encode())
    for current in streamed.passes:
        digest.update(current.labels.domain_N.numpy().tobytes())
    return digest.hexdigest()
