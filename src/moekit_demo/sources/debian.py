"""Larger English texts in Debian packages: Jane Austen's novels, the kernel's documentation, the GCIDE dictionary."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from moekit.data.sources import Piece
from moekit_demo.base import PackagedText
from moekit_demo.packages import read_members

# Enough for small studies; the packages hold up to 40 MB of text.
MAX_BYTES = 12_000_000
ENTRIES_PER_DOCUMENT = 100


def r_strings(serialized: bytes) -> Iterator[str]:
    """The strings in R's binary serialization: a flag word of type 9, a 4-byte length, the bytes."""
    position = 0
    while (position := serialized.find(b"\x00\x09", position)) >= 0:
        start = position + 2
        (length,) = struct.unpack_from(">i", serialized, start) if start + 4 <= len(serialized) else (-1,)
        raw = serialized[start + 4 : start + 4 + max(0, length)]
        if length < 0 or len(raw) < length or not _is_text(raw):
            position += 1
            continue
        yield raw.decode()
        position = start + 4 + length


def _is_text(raw: bytes) -> bool:
    try:
        return all(c >= " " or c in "\t\n" for c in raw.decode())
    except UnicodeDecodeError:
        return False


def _austen(archive: Path) -> Iterator[Piece]:
    for _, content in read_members(archive, lambda name: name.endswith("janeaustenr/data/Rdata.rdb")):
        position = number = 0
        while position + 4 < len(content):
            # Records: 4-byte length that is followed by a zlib stream.
            stream = zlib.decompressobj()
            serialized = stream.decompress(content[position + 4 :])
            position = len(content) - len(stream.unused_data)
            text = "\n".join(r_strings(serialized))
            if len(text) > 10_000:
                yield from _chapters(text, number)
                number += 1


def _chapters(novel: str, number: int) -> Iterator[Piece]:
    for chapter, text in enumerate(re.split(r"(?im)^(?=(?:chapter|letter) [ivxlc\d]+\b)", novel)):
        yield Piece(f"novel-{number}-{chapter}", text)


def _kernel(archive: Path) -> Iterator[Piece]:
    size = 0
    for name, content in read_members(archive, lambda name: bool(re.search(r"/Documentation/.*\.rst(\.gz)?$", name))):
        if "/translations/" in name:
            continue
        raw = gzip.decompress(content) if name.endswith(".gz") else content
        size += len(raw)
        if size > MAX_BYTES:
            return
        yield Piece(name.partition("/Documentation/")[2], raw.decode("utf-8", "replace"))


def _gcide(archive: Path) -> Iterator[Piece]:
    for _, content in read_members(archive, lambda name: name.endswith("gcide.dict.dz")):
        text = gzip.decompress(content)[:MAX_BYTES].decode("utf-8", "ignore")
        entries = re.split(r"\n\n(?=\S)", re.sub(r"\n? *\[1913 Webster\]\n?", "\n", text))
        for start in range(0, len(entries), ENTRIES_PER_DOCUMENT):
            yield Piece(f"entries-{start}", "\n\n".join(entries[start : start + ENTRIES_PER_DOCUMENT]))


SOURCES = (
    PackagedText(
        name="austen",
        domain="english-novels",
        licence="public domain (package: MIT)",
        extract=_austen,
        client="apt",
        packages=("r-cran-janeaustenr",),
        download_bytes=1_626_392,
    ),
    PackagedText(
        name="kernel-docs",
        domain="kernel-docs",
        licence="GPL-2.0",
        extract=_kernel,
        client="apt",
        packages=("linux-doc-6.1", "linux-doc-6.12"),
        download_bytes=37_342_932,
    ),
    PackagedText(
        name="gcide",
        domain="english-dictionary",
        licence="GPL-3.0+",
        extract=_gcide,
        client="apt",
        packages=("dict-gcide",),
        download_bytes=14_800_692,
    ),
)
