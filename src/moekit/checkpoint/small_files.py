"""Carry along what a model needs beside its weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from moekit.checkpoint.card import CARD_FILE
from moekit.checkpoint.hub import SMALL_FILES
from moekit.checkpoint.record import RECORD_FILE
from moekit.checkpoint.safety import check_name


def small_files(source: Path) -> Iterator[Path]:
    """Config, tokenizer and licence of a folder; not its indices, record and card, which every change writes anew.

    Raises:
        UnsafeInput: a link that leaves the folder.
    """
    names = {file.name for pattern in SMALL_FILES for file in source.glob(pattern)}
    for name in sorted(names - {RECORD_FILE, CARD_FILE}):
        if not name.endswith(".index.json"):
            yield check_name(source, name)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and licence into another folder."""
    for file in small_files(source):
        shutil.copyfile(file, target / file.name)
