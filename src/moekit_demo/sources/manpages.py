"""Manual pages in several languages (Debian `manpages-de` and its sisters)."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moekit.data.sources import Piece
from moekit_demo.base import PackagedText
from moekit_demo.packages import read_members

LANGUAGES = {"de": "german", "fr": "french", "es": "spanish", "ru": "russian"}

_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)")
_SPECIAL = {
    r"\-": "-",
    r"\&": "",
    r"\,": "",
    r"\/": "",
    r"\e": "\\",
    r"\(aq": "'",
    r"\(bu": "*",
    r"\ ": " ",
    r"\~": " ",
}
_SPECIALS = re.compile("|".join(map(re.escape, _SPECIAL)))
# Requests whose arguments are text.
_WITH_TEXT = re.compile(r"^\.\s*(SH|SS|B|I|BR|IR|RB|RI|BI|IB|SM|SB|IP|TP)\b\s*(.*)$")


def plain_roff(page: str) -> str:
    """Plain text of a manual page: requests and font changes are left out, their text stays."""
    lines: list[str] = []
    for line in page.splitlines():
        match = _WITH_TEXT.match(line)
        if match:
            text = match[2].replace('"', "")
            line = f"\n{text}" if match[1] in ("SH", "SS") else text
        elif line.startswith((".", "'")):
            continue
        line = _SPECIALS.sub(lambda m: _SPECIAL[m[0]], _FONT.sub("", line))
        if line.strip():
            lines.append(line.rstrip())
    return "\n".join(lines)


def _extract(language: str) -> Callable[[Path], Iterator[Piece]]:
    pattern = re.compile(rf"^usr/share/man/{language}/man\d\w*/[^/]+\.gz$")

    def extract(archive: Path) -> Iterator[Piece]:
        members = read_members(archive, lambda name: bool(pattern.match(name)))
        for name, content in sorted(members):
            text = plain_roff(gzip.decompress(content).decode("utf-8", "replace"))
            if len(text) > 200:  # shorter ones only point to another page
                yield Piece(name.rpartition("/")[2].removesuffix(".gz"), text)

    return extract


SOURCES = tuple(
    PackagedText(
        name=f"manpages-{language}",
        domain=f"{name}-manuals",
        licence="GPL-2+, BSD and others, as each page says",
        extract=_extract(language),
        client="apt",
        packages=(f"manpages-{language}",),
        download_bytes=3_600_000,
    )
    for language, name in LANGUAGES.items()
)
