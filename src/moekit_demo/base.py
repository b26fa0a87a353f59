"""A source of text or questions out of a package, and how its content is read."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekit import __version__
from moekit._files import read_text
from moekit._progress import Progress
from moekit.data.sources import Kind, Piece, SourceInfo
from moekit.errors import BadData
from moekit_demo.cache import home, new_folder
from moekit_demo.packages import Client, cached_package, has_client, sha256_of

logger = logging.getLogger(__name__)

DOCUMENTS_FILE = "documents.jsonl"
RECORD_FILE = "source.json"


@dataclass(frozen=True)
class PackagedText:
    """A source and how to read it.

    Attributes:
        name: unique name.
        domain: domain of its documents.
        licence: licence of the content.
        extract: reads the downloaded package (or, without a client, the machine itself) into pieces.
        client: package client; None where the machine itself holds the text.
        packages: package name, or several of which the first that can be had is taken (Debian's change by release).
        version: exact version; None takes the newest.
        sha256: digest of the extracted text of that version, None where it differs between machines.
        download_bytes: about how much is downloaded.
        kind: "text" or "questions".
        present: for sources without a client, whether the machine holds them.
    """

    name: str
    domain: str
    licence: str
    extract: Callable[[Path], Iterable[Piece]]
    client: Client | None = None
    packages: tuple[str, ...] = ()
    version: str | None = None
    sha256: str | None = None
    download_bytes: int = 0
    kind: Kind = "text"
    present: Callable[[], bool] = lambda: True

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return home() / "sources" / self.name

    @property
    def origin(self) -> str:
        """Client and package, or "this machine"."""
        return f"{self.client}: {self.packages[0]}" if self.client else "this machine"

    def info(self) -> SourceInfo:
        """What is known before fetching."""
        return SourceInfo(
            name=self.name,
            kind=self.kind,
            domain=self.domain,
            origin=self.origin,
            licence=self.licence,
            download_bytes=self.download_bytes,
            obtainable=has_client(self.client) if self.client else self.present(),
            cached=self._cached(),
        )

    def fetch(self, progress: Progress | None = None) -> Path:
        """Make sure that the source is in the cache.

        Returns:
            Its folder, with `documents.jsonl` and `source.json`.

        Raises:
            BadData: it cannot be had here, or its text is not what this version of the package holds.
        """
        if self._cached():
            return self.folder
        if progress is not None:
            progress.start(f"fetching {self.name} ({self.origin})", None)
        try:
            self._build()
        finally:
            if progress is not None:
                progress.finish()
        return self.folder

    def _cached(self) -> bool:
        """Whether the cache holds what this version of moekit extracts."""
        try:
            record = json.loads(read_text(self.folder / RECORD_FILE))
        except (OSError, ValueError):
            return False
        return isinstance(record, dict) and record.get("moekit") == __version__

    def _build(self) -> None:
        if self.client is None and not self.present():
            raise BadData(f"the source {self.name!r} is not on this machine", hint="choose one of `moekit data list`")
        archive = self._package()
        try:
            self._extract(archive)
        except BadData:
            if self.client is not None:  # so that fetching again downloads again
                shutil.rmtree(archive.parent, ignore_errors=True)
            raise

    def _extract(self, archive: Path) -> None:
        digest = sha256_of(archive) if self.client else None
        if not self._cached():
            shutil.rmtree(self.folder, ignore_errors=True)  # of another version
        with new_folder(self.folder) as part:
            documents, size, text_digest = _write_pieces(part / DOCUMENTS_FILE, self.extract(archive))
            if documents == 0:
                raise BadData(f"no text was found in {archive}", hint="the package has changed")
            if self.sha256 is not None and text_digest != self.sha256:
                raise BadData(
                    f"the text of {self.name!r} has the digest {text_digest}, expected {self.sha256}",
                    hint=f"{archive.name} was replaced or damaged on its way: fetch it again",
                )
            record = {
                **{k: v for k, v in asdict(self.info()).items() if k not in ("obtainable", "cached")},
                "file": archive.name if self.client else None,
                "file_sha256": digest,
                "text_sha256": text_digest,
                "documents": documents,
                "bytes": size,
                "moekit": __version__,
            }
            (part / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        logger.info("fetched %s: %d documents, %d bytes", self.name, documents, size)

    def _package(self) -> Path:
        if self.client is None:
            return Path(self.origin)
        for package in self.packages[:-1]:
            try:
                return cached_package(self.client, package, version=self.version)
            except BadData as error:
                logger.info("%s: %s", package, error.message)
        return cached_package(self.client, self.packages[-1], version=self.version)

    def pieces(self, progress: Progress | None = None) -> Iterator[Piece]:
        """The documents, in the package's order; fetches them if need be."""
        path = self.fetch(progress) / DOCUMENTS_FILE
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                fields: dict[str, Any] = json.loads(line)
                yield Piece(fields["name"], fields["text"])


def _write_pieces(path: Path, pieces: Iterable[Piece]) -> tuple[int, int, str]:
    digest = hashlib.sha256()
    documents = size = 0
    with path.open("w", encoding="utf-8") as stream:
        for piece in pieces:
            # An archive may hold lone surrogates or NULs, which no tokenizer should meet.
            text = piece.text.encode("utf-8", "ignore").decode().replace("\0", "").strip()
            if not text:
                continue
            raw = text.encode()
            digest.update(raw + b"\0")
            documents += 1
            size += len(raw)
            stream.write(json.dumps({"name": piece.name, "text": text}, ensure_ascii=False) + "\n")
    return documents, size, digest.hexdigest()
