"""Back to the checkpoint that another one was made from."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from moekit.checkpoint import Checkpoint, Record, atomic_folder
from moekit.errors import BadCheckpoint, BadConfig


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a record names.

    Attributes:
        folder: the changed checkpoint.
        command: what made it.
        parent: where the parent lies here.
        nbytes: bytes of the parent's files.
    """

    folder: Path
    command: str
    parent: Path
    nbytes: int


def find_parent(folder: str | Path) -> Parent:
    """Find the parent of a checkpoint and prove that it is the one that the record names.

    Raises:
        BadConfig: the folder has no record, or the record names no parent.
        BadCheckpoint: the parent is gone, or is no longer what it was.
    """
    folder = Path(folder)
    record = Record.read(folder)
    if record is None:
        raise BadConfig(
            "there is no moekit.json here, so nothing to undo", file=folder, hint="give a folder moekit wrote"
        )
    if record.parent is None:
        raise BadConfig("its record names no parent", file=folder, hint="it was made from nothing")
    try:
        parent = Checkpoint.open(record.parent)
    except BadCheckpoint as error:
        hint = "bring it back to where it was, or make the change again in reverse"
        raise BadCheckpoint(
            f"its parent {record.parent} cannot be opened: {error.message}", file=folder, hint=hint
        ) from error
    if record.parent_fingerprint and parent.fingerprint != record.parent_fingerprint:
        raise BadCheckpoint(
            f"this is no longer the parent of {folder}: its fingerprint is {parent.fingerprint[:12]}, "
            f"the record says {record.parent_fingerprint[:12]}",
            file=parent.path,
            hint="restore the parent from a copy",
        )
    nbytes = sum(file.stat().st_size for file in parent.path.rglob("*") if file.is_file())
    return Parent(folder, record.command, parent.path, nbytes)


def undo(folder: str | Path, *, keep: str | Path) -> Parent:
    """Put the parent's files in the place of a checkpoint; the checkpoint itself is kept under another name.

    Args:
        folder: the changed checkpoint.
        keep: where it goes.

    Raises:
        BadConfig: see `find_parent`; or `keep` is taken.
        BadCheckpoint: see `find_parent`.
    """
    found = find_parent(folder)
    copy_folder(found.folder, Path(keep), overwrite=False)
    copy_folder(found.parent, found.folder, overwrite=True)
    return found


def copy_folder(source: Path, target: Path, *, overwrite: bool) -> None:
    """Copy a checkpoint, whole or not at all; by hard links where the disk allows: nobody writes into its files."""
    with atomic_folder(target, overwrite=overwrite) as temporary:
        for file in sorted(source.rglob("*")):
            place = temporary / file.relative_to(source)
            if file.is_dir():
                place.mkdir(exist_ok=True)
                continue
            try:
                os.link(file.resolve(), place)
            except OSError:
                shutil.copyfile(file, place)
