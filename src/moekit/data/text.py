"""Text as documents with a domain: from files, folders, hub data sets, packages, or mixes of these."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moekit._progress import Progress
from moekit.data.formats import PICTURES, SUFFIXES, Messages, Picture, read_records
from moekit.data.sources import all_sources, get_source, resolve_mix, text_mixes
from moekit.data.split import Split, sample, split_texts
from moekit.errors import BadConfig, BadData, printable

logger = logging.getLogger(__name__)

# Files that are not read are named, up to so many.
_NAMED = 5


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: plain text, never blank.
        domain: what kind of text it is; statistics and perplexities are reported per domain.
        source: where it came from: a path, or source and name within it.
        messages: role and content of each turn, where it is a conversation; `text` is then what they say.
    """

    text: str
    domain: str
    source: str
    messages: Messages = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Pictures that its turns show, in their order."""
        parts = (part for _, content in self.messages if not isinstance(content, str) for part in content)
        return tuple(part for part in parts if isinstance(part, Picture))


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
        spec: a file of plain text, or of JSON records (see `moekit.data.formats`); a folder, in which each file or
            sub-folder is a domain; the name of a source (`moekit data list`) or mix ("demo", "six-domains"); a data
            set id on the hub, `name` or `name:config`; or several of these joined by `+`.
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
    return _chosen(spec, _by_domain(spec, progress), split, limit_bytes, seed)


def load_split(spec: str, *, progress: Progress | None = None) -> tuple[list[Document], list[Document]]:
    """Both parts of a text, read once: what `load_text` gives for "train" and for "heldout".

    Raises:
        BadData: nothing there, no text in it or in one of the parts, or a damaged file; names file and line.
    """
    by_domain = _by_domain(spec, progress)
    return _chosen(spec, by_domain, "train", None, 0), _chosen(spec, by_domain, "heldout", None, 0)


def _by_domain(spec: str, progress: Progress | None) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    for part in spec.split("+"):
        for document in _load_part(part.strip(), progress):
            if document.text.strip():
                found.setdefault(document.domain, []).append(document)
    if not found:
        raise BadData(f"{spec!r} holds no text", hint="every document is empty or white space")
    return found


def _chosen(
    spec: str, by_domain: Mapping[str, list[Document]], split: Split | None, limit_bytes: int | None, seed: int
) -> list[Document]:
    share = None if limit_bytes is None else limit_bytes // len(by_domain)
    chosen: list[Document] = []
    for documents in by_domain.values():
        kept = split_texts([d.text for d in documents], split)
        if share is not None:
            kept = sample(kept, share, seed)
        chosen += [_part(documents[i], text) for i, text in kept]
    if not chosen:
        raise BadData(f"no text is left of {spec!r}", hint=f"it is too short for split {split} and limit {limit_bytes}")
    return chosen


def _part(document: Document, text: str) -> Document:
    """A document, or a part of its text; a conversation that was cut is plain text."""
    messages = document.messages if text == document.text else ()
    return Document(text, document.domain, document.source, messages)


# name, org/name, either with :config
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def _load_part(spec: str, progress: Progress | None) -> Iterator[Document]:
    if not spec:
        raise BadData("no text is named", hint="give a file, a folder, or a source of `moekit data list`")
    if spec in text_mixes():
        for name in resolve_mix(spec, progress):
            yield from _load_part(name, progress)
        return
    path = Path(spec).expanduser()
    if spec in all_sources():
        source = get_source(spec)
        if source.info().kind != "text":
            raise BadData(f"the source {spec!r} is no text", hint="it is fetched by `moekit data fetch`")
        for piece in source.pieces(progress):
            yield Document(piece.text, source.info().domain, f"{spec}:{piece.name}")
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


def _load_file(path: Path, domain: str) -> Iterator[Document]:
    name = printable(str(path))
    for record in read_records(path):
        source = f"{name}:{record.line}" if record.line else name
        yield Document(record.text, record.domain or domain, source, record.messages)


def _load_folder(folder: Path) -> Iterator[Document]:
    """Files in order of their names; what is not read is said."""
    found, passed = False, []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            if path.is_dir() or path.name.startswith("."):
                continue
            if path.suffix.lower() in PICTURES:
                continue  # conversations name them
            if path.suffix not in SUFFIXES or not path.is_file() or not path.stat().st_size:
                passed.append(path)
                continue
            found = True
            # A name of bytes that are no UTF-8 is a domain all the same, in what of it can be written.
            yield from _load_file(path, printable(entry.stem if entry.is_file() else entry.name))
    if not found:
        raise BadData(
            f"the folder holds no {', '.join(SUFFIXES)} file with text", file=folder, hint="rename or convert them"
        )
    if passed:
        names = ", ".join(printable(str(path.relative_to(folder))) for path in passed[:_NAMED])
        more = f" and {len(passed) - _NAMED} more" if len(passed) > _NAMED else ""
        why = f"not read, as they are empty or none of {', '.join(SUFFIXES)}"
        logger.warning("%s: %s: %s%s", printable(str(folder)), why, names, more)
