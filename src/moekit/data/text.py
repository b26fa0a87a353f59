"""Text as documents with a domain: from files, folders, hub data sets, packages, or mixes of these."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moekit._files import read_text
from moekit._progress import Progress
from moekit.data.mixes import MIXES, resolve_mix
from moekit.data.sources import all_sources, get_source
from moekit.data.sources.base import Source
from moekit.data.split import Split, sample, split_texts
from moekit.errors import BadConfig, BadData, printable

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: plain text, never blank.
        domain: what kind of text it is; statistics and perplexities are reported per domain.
        source: where it came from: a path, or source and name within it.
    """

    text: str
    domain: str
    source: str


def load_text(
    spec: str,
    *,
    split: Split | None = None,
    limit_bytes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Document]:
    """Load documents.

    Args:
        spec: a .txt or .jsonl file (field `text`, optional `domain`); a folder, in which each file or sub-folder is a
            domain; the name of a source (`moekit data list`) or mix ("demo", "six-domains"); a data set id on the hub,
            `name` or `name:config`; or several of these joined by `+`.
        split: "train" or "heldout", which never overlap; None for all. See `moekit.data.split.split_texts`.
        limit_bytes: UTF-8 bytes in all, shared evenly among the domains; excerpts are then drawn at random. None
            keeps everything, in order.
        seed: of the drawing.
        progress: told of downloads.

    Returns:
        Documents, domain by domain in a fixed order.

    Raises:
        BadData: nothing there, no text in it, or a damaged file; names file and line.
        BadConfig: an impossible split or limit.
    """
    if split not in (None, "train", "heldout"):
        raise BadConfig(f"no split is called {split!r}", hint='use "train", "heldout" or none')
    if limit_bytes is not None and limit_bytes < 1:
        raise BadConfig(f"limit_bytes is {limit_bytes}", hint="give a positive number of bytes, or leave it out")
    by_domain: dict[str, list[Document]] = {}
    for part in spec.split("+"):
        for document in _load_part(part.strip(), progress):
            if document.text.strip():
                by_domain.setdefault(document.domain, []).append(document)
    if not by_domain:
        raise BadData(f"{spec!r} holds no text", hint="every document is empty or white space")
    share = None if limit_bytes is None else limit_bytes // len(by_domain)
    chosen: list[Document] = []
    for documents in by_domain.values():
        kept = split_texts([d.text for d in documents], split)
        if share is not None:
            kept = sample(kept, share, seed)
        chosen += [Document(text, documents[i].domain, documents[i].source) for i, text in kept]
    if not chosen:
        raise BadData(f"no text is left of {spec!r}", hint=f"it is too short for split {split} and limit {limit_bytes}")
    return chosen


# name, org/name, either with :config
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def _load_part(spec: str, progress: Progress | None) -> Iterator[Document]:
    if not spec:
        raise BadData("no text is named", hint="give a file, a folder, or a source of `moekit data list`")
    if spec in MIXES:
        for name in resolve_mix(spec, progress):
            yield from _load_part(name, progress)
        return
    path = Path(spec).expanduser()
    if spec in all_sources():
        source = get_source(spec)
        if not isinstance(source, Source) or source.kind != "text":
            raise BadData(f"the source {spec!r} is no text", hint="it is fetched by `moekit data fetch`")
        for piece in source.pieces(progress):
            yield Document(piece.text, source.domain, f"{spec}:{piece.name}")
    elif path.is_dir():
        yield from _load_folder(path)
    elif path.exists():
        yield from _load_file(path, printable(path.stem))
    elif path.suffix in SUFFIXES or path.is_absolute() or spec.startswith((".", "~")) or not _HUB_NAME.fullmatch(spec):
        raise BadData("there is no such file or folder", file=spec, hint="give an existing path")
    else:
        from moekit.data.hub import load_hub

        for text, where in load_hub(spec):
            yield Document(text, spec.partition(":")[0], where)


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise BadData(
            f"is not UTF-8 text (byte {error.start})", file=path, hint="convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise BadData(f"cannot be read: {error.strerror}", file=path) from error


def _load_file(path: Path, domain: str) -> Iterator[Document]:
    if path.suffix != ".jsonl":
        yield Document(_read(path), domain, printable(str(path)))
        return
    # Not splitlines(): JSON strings may hold other line separators unescaped.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadData(f"line {number} is not JSON: {error}", file=path, hint="one JSON object a line") from error
        text = fields.get("text") if isinstance(fields, dict) else None
        if not isinstance(text, str):
            raise BadData(f"line {number} has no string field `text`", file=path, hint='{"text": "..."} a line')
        named = str(fields.get("domain") or domain)
        if not (_is_text(text) and _is_text(named)):
            raise BadData(f"line {number} holds half a character (a lone surrogate)", file=path, hint="mend the line")
        yield Document(text, named, printable(f"{path}:{number}"))


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, which no tokenizer and no file does without."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_folder(folder: Path) -> Iterator[Document]:
    found = False
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        files = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
        for path in files:
            if path.suffix in SUFFIXES and path.is_file():
                found = True
                # A name of bytes that are no UTF-8 is a domain all the same, in what of it can be written.
                yield from _load_file(path, printable(entry.stem if entry.is_file() else entry.name))
    if not found:
        raise BadData(f"the folder holds no {' or '.join(SUFFIXES)} file", file=folder, hint="rename or convert them")
