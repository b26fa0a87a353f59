"""What recipes cost on a text: statistics, gradients where the model fits in memory, and the table of costs."""

from __future__ import annotations

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
from moekit.compress.joint.costs import CostTable, known_rows
from moekit.compress.joint.gradients import BlockGradients, block_gradients
from moekit.compress.joint.measuring import measure
from moekit.data import Document
from moekit.errors import UnsupportedModel
from moekit.jobs.fitting.request import Asked, room, whole_bytes
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
        statistics: decoder layer -> what methods decide from.
        meta: of the text.
        why: why costs are no Fisher errors; "" where they are.
    """

    table: CostTable
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
        OutOfBudget: Fisher errors are asked for, and the model does not fit in memory.
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
        trace = streamed.trace(
            tokenizer=tokenizer, source=origin(options.data, apart=options.heldout is None), seed=seed
        )
        statistics = {layer: record.statistics for layer, record in streamed.records.items()}
        table = CostTable(
            model=source.parent,
            fingerprint=source.checkpoint.fingerprint,
            methods=asked.composer.told,
            group=asked.sizes.group,
            seed=seed,
            tokens=streamed.tokens,
            ids_sha256=ids_hash(streamed),
        )
        file = None if options.costs is None else Path(options.costs).expanduser()
        table = table if file is None else known_rows(file, table)
        table, why = _measured(options, asked, streamed, statistics, table, scratch, progress)
    if file is not None:
        atomic_write(file, table.model_dump_json(indent=1) + "\n")
    return Priced(table.in_changes() if why else table.in_nats(), statistics, trace.meta, why)


def _measured(
    options: FitOptions,
    asked: Asked,
    streamed: Streamed,
    statistics: Mapping[int, LayerStatistics],
    table: CostTable,
    scratch: Path,
    progress: Progress | None,
) -> tuple[CostTable, str]:
    geometries = asked.source.geometries
    wanted = {layer: asked.menu.of(g.experts, g.width) for layer, g in geometries.items()}
    why = why_no_gradients(options, asked, streamed)
    if not table.missing(wanted, fisher=options.price != "change"):
        return table, "" if options.price != "change" else why
    if why and options.price == "fisher":
        raise UnsupportedModel(f"costs cannot be weighted by gradients: {why}", hint="say --price change, or auto")
    missing = table.missing(wanted, fisher=not why)
    if not missing:
        return table, why
    gradients = None
    if not why:
        try:
            gradients = _gradients(options, asked, streamed, table, scratch, progress)
        except UnsupportedModel as error:
            if options.price == "fisher":
                raise
            why = error.message
            missing = table.missing(wanted, fisher=False)
    folder = scratch / "costs"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = measure(
            streamed,
            statistics,
            asked.composer,
            missing,
            asked.sizes,
            gradients=gradients,
            seed=table.seed,
            folder=folder,
            progress=progress,
        )
    finally:
        if gradients is not None:
            gradients.close()
    return table.with_rows(rows), why


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


def _gradients(
    options: FitOptions,
    asked: Asked,
    streamed: Streamed,
    table: CostTable,
    scratch: Path,
    progress: Progress | None,
) -> BlockGradients:
    folder = scratch / "gradients"
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / "finished.json"
    key = json.dumps([table.ids_sha256, table.seed, options.dtype])
    if finished.is_file() and read_text(finished) == key:
        return BlockGradients.opened(list(asked.source.geometries), streamed.walk.batches, streamed.walk.hidden, folder)
    finished.unlink(missing_ok=True)
    model: Any = load_for_answers(asked.source, options.device, options.dtype).requires_grad_(False)
    made = block_gradients(model, streamed.walk.batches, seed=table.seed, folder=folder, progress=progress)
    atomic_write(finished, key)
    del model
    gc.collect()
    return_freed_memory()
    return made


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
