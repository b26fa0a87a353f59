"""Text that is on every machine: the code of Python's standard library, and Debian's licence texts."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moekit.data.sources import Piece
from moekit_demo.base import PackagedText

LICENCES = Path("/usr/share/common-licenses")
# Tests repeat themselves, generated tables are no code that people write.
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
_SKIP_PREFIXES = ("encodings/", "config-")
MAX_FILE_BYTES = 400_000


def standard_library() -> Iterator[Piece]:
    """The interpreter's own modules, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skip = _SKIP.intersection(relative.parts) or str(relative.as_posix()).startswith(_SKIP_PREFIXES)
        if skip or path.stat().st_size > MAX_FILE_BYTES:
            continue
        yield Piece(relative.as_posix(), path.read_text(encoding="utf-8", errors="ignore"))


def licence_texts() -> Iterator[Piece]:
    """GPL, Apache and other licences."""
    for path in sorted(LICENCES.iterdir()):
        if path.is_file() and not path.is_symlink():
            yield Piece(path.name, path.read_text(encoding="utf-8", errors="ignore"))


SOURCES = (
    PackagedText(
        name="stdlib",
        domain="python-code",
        licence="PSF-2.0",
        extract=lambda _: standard_library(),
        present=lambda: any(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")),
    ),
    PackagedText(
        name="licences",
        domain="licences",
        licence="each its own; all may be copied verbatim",
        extract=lambda _: licence_texts(),
        present=LICENCES.is_dir,
    ),
)
