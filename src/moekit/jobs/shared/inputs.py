"""Opening what steps read: models with their tokenizers and plans, text as documents and batches."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.jobs.shared.estimates import Item, Sizes

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from moekit._progress import Progress
    from moekit.checking import CheckReport
    from moekit.checkpoint import Record
    from moekit.data import Document, TokenBatches
    from moekit.jobs.context import JobContext


# A packaged model is kept in 4 bits a weight and unpacked to 32: it grows at most so many times.
_UNPACKED = 8


def is_packaged_model(reference: str) -> bool:
    """Whether a model reference is the name of a model that a package carries, such as "smollm2"."""
    from moekit.data.sources import all_sources

    source = all_sources().get(reference)
    return source is not None and source.info().kind == "model"


def is_model(reference: str) -> bool:
    """Whether a reference means a model: a packaged one, or a folder with a config."""
    return is_packaged_model(reference) or (Path(reference).expanduser() / "config.json").is_file()


def model_location(reference: str, progress: Progress | None = None) -> str:
    """The folder of a model that a package carries, fetched if need be; folders and hub ids as they are."""
    if not is_packaged_model(reference):
        return reference
    from moekit.data import fetch

    return str(fetch(reference, progress))


def open_model(
    reference: str,
    *,
    plan: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a model in eval mode with its tokenizer, and let it route by a plan.

    Args:
        reference: folder, hub id, or name of a packaged model.
        plan: folder of a routing plan; None keeps the policy that the checkpoint carries.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16", ...
        progress: told of downloads.

    Returns:
        (model, tokenizer).
    """
    import moekit
    from moekit.data import vocabulary

    location = model_location(reference, progress)
    model = moekit.load(location, device=device, dtype=dtype)
    tokenizer = load_tokenizer(location)
    vocabulary.check(tokenizer, vocabulary.embedding_rows(model))
    if plan is not None:
        from moekit.checkpoint import fingerprint_model
        from moekit.routing import RoutingPlan

        RoutingPlan.load(plan).apply(model, fingerprint=fingerprint_model(model))
    model.eval()
    return model, tokenizer


def is_first_rank() -> bool:
    """Whether this process is the only one or, under torchrun, the first: the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def save_changed(
    model: Any,
    tokenizer: Any,
    work: JobContext,
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
        work: where, by which command, with which seed.
        parent: reference of the model it was made from.
        config: settings of the method.
        scores: figures to keep in the record.
        plan_hash: hash of the plan that was applied.
        drop_unknown: leave out what the source holds beyond the model; otherwise it is copied.

    Raises:
        BadCheckpoint: what was written is not what it must be; nothing is left.
    """
    from moekit.checkpoint import Checkpoint, Record

    if not is_first_rank():
        return
    location = model_location(parent)
    local = Path(location).expanduser()
    record = Record(
        command=work.command,
        parent=str(local.resolve()) if local.is_dir() else location,
        parent_fingerprint=Checkpoint.open(location).fingerprint,
        seed=work.seed,
        plan_hash=plan_hash,
        config=dict(config),
        scores=dict(scores or {}),
    )
    _write_checked(model, tokenizer, record, work, drop_unknown)


def _write_checked(model: Any, tokenizer: Any, record: Record, work: JobContext, drop_unknown: bool) -> None:
    """Write, check, and only then give it its name."""
    import moekit
    from moekit.checking import check
    from moekit.checkpoint import atomic_folder

    with atomic_folder(work.out, overwrite=work.overwrite) as folder:
        inner = folder / work.out.name
        moekit.save(model, inner, tokenizer=tokenizer, record=record, drop_unknown=drop_unknown)
        _judge(check(inner, progress=work.progress), work.out)
        for file in list(inner.iterdir()):
            file.rename(folder / file.name)
        inner.rmdir()


def _judge(report: CheckReport, out: Path) -> None:
    """Raise what writing may have done, and warn of what the model itself is.

    The digests have just been taken from memory, so an expert that can only answer zero was so before: right after a
    conversion, or because training chose it for no token. That is no reason to throw the training away.
    """
    silent = [f for f in report.findings if f.code == "dead-expert"]
    others = [f for f in report.findings if f.code != "dead-expert"]
    report.model_copy(update={"findings": others}).raise_if_bad()
    for layer, count in sorted(Counter(f.layer for f in silent).items(), key=str):
        logger.warning("%s: layer %s: %d experts can only answer zero; train them, or prune them", out, layer, count)
    for finding in others:
        if finding.severity == "warning":
            place = "" if finding.layer is None else f"layer {finding.layer}: "
            logger.warning("%s: %s%s", out, place, finding.message)


def load_tokenizer(location: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    from moekit.errors import BadCheckpoint

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
    from moekit.data.text import load_text

    return load_text(reference, split=split, limit_bytes=limit_bytes, seed=seed, progress=progress)


def rows_of(
    documents: list[Document], tokenizer: Any, *, seq_len: int, max_tokens: int | None, progress: Progress | None = None
) -> TokenBatches:
    """Lay documents out in rows, each document cut so that all together have about `max_tokens`."""
    from moekit.data import pack

    per_document = None if max_tokens is None else max(1, -(-max_tokens // len(documents)))
    return pack(documents, tokenizer, seq_len, max_tokens_per_doc=per_document, progress=progress)


def calibration_rows(
    documents: list[Document], tokenizer: Any, *, seq_len: int, max_tokens: int | None, progress: Progress | None = None
) -> TokenBatches:
    """Lay at most `max_tokens` of a text out in rows, an equal share of each domain (`moekit.data.shares`)."""
    from moekit.data.batches import arrange
    from moekit.data.shares import take_shares

    return arrange(take_shares(documents, tokenizer, max_tokens, progress=progress), seq_len)


def model_item(reference: str, sizes: Sizes) -> Item:
    """A model with its bytes on disk: measured, forecast, or read from the hub's headers without a download."""
    known = sizes.of(Path(reference).expanduser())
    if known is not None:
        _refuse_bad_config(Path(reference).expanduser())
        return Item(reference, known)
    if is_packaged_model(reference):
        from moekit.data.sources import get_source

        packed = get_source(reference).info().download_bytes
        return Item(reference, sizes.of(get_source(reference).folder) or _UNPACKED * packed)
    return Item(reference, _hub_bytes(reference))


def _refuse_bad_config(folder: Path) -> None:
    """A dry run of a model that no command would open says so."""
    from moekit.checkpoint.folder import CONFIG_FILE
    from moekit.checkpoint.safety import check_name, read_json
    from moekit.checkpoint.sanity import check_config

    if folder.is_dir() and (folder / CONFIG_FILE).exists():
        check_config(read_json(check_name(folder, CONFIG_FILE)), folder / CONFIG_FILE)


def _hub_bytes(reference: str) -> int | None:
    from moekit.checkpoint.estimate import estimate
    from moekit.errors import MoekitError

    try:
        return estimate(reference).disk_bytes
    except MoekitError:
        return None


def text_item(reference: str, sizes: Sizes) -> Item:
    """A text with its bytes: measured, forecast, or about what would be downloaded."""
    known = sizes.of(Path(reference).expanduser())
    if known is not None:
        return Item(reference, known)
    from moekit.data.mixes import MIXES
    from moekit.data.sources import all_sources

    names = [candidates[0] for candidates in MIXES[reference]] if reference in MIXES else [reference]
    infos = [all_sources()[name].info() for name in names if name in all_sources()]
    return Item(reference, sum(info.download_bytes for info in infos) if infos else None)
