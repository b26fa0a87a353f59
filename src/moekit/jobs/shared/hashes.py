"""Hashes of what steps read and write, so that a step runs again exactly when something it depends on changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moekit._files import open_regular

# Files up to this size are hashed whole; of larger ones, evenly spaced blocks, both ends among them.
WHOLE_BYTES = 32 << 20
BLOCKS = 256
BLOCK_BYTES = 1 << 16


def hash_of(value: Any) -> str:
    """sha256 of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def artefact_hash(path: str | Path) -> str | None:
    """sha256 over names, sizes and contents of a file or of all files in a folder; None if nothing is there."""
    path = Path(path).expanduser()
    if path.is_file():
        return hash_of(["file", path.stat().st_size, _content(path)])
    if path.is_dir():
        return hash_of([[name, file.stat().st_size, _content(file)] for name, file in _files(path)])
    return None


def local_parts(reference: str) -> list[Path]:
    """What a reference names that lies here: a file, a folder, or those of a mix (`a+b`)."""
    parts = [reference] if os.path.exists(os.path.expanduser(reference)) else reference.split("+")
    paths = [os.path.expanduser(part.strip()) for part in parts if part.strip()]
    return [Path(path) for path in paths if os.path.exists(path)]


def reference_hash(reference: str) -> list[str | None]:
    """sha256 of each part of a reference that lies here; empty where all of it comes from elsewhere."""
    return [artefact_hash(path) for path in local_parts(reference)]


def text_hash(reference: str | None) -> str:
    """sha256 over all local parts of a text; "" where it has none."""
    found = reference_hash(reference) if reference else []
    return hash_of(found) if found else ""


def listing(path: str | Path) -> list[list[Any]]:
    """Names and sizes of all files: what tells cheaply that an output is still as it was written."""
    path = Path(path)
    if path.is_file():
        return [["", path.stat().st_size]]
    return [[name, file.stat().st_size] for name, file in _files(path)]


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    names = sorted((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file())
    yield from ((name, file) for name, file in names if not name.startswith("."))


def _content(file: Path) -> str:
    digest = hashlib.sha256()
    size = file.stat().st_size
    with open_regular(file) as stream:
        if size <= WHOLE_BYTES:
            while block := stream.read(1 << 20):
                digest.update(block)
        else:
            for number in range(BLOCKS):
                stream.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
