"""Back to the checkpoint that another one was made from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moekit.checkpoint import Checkpoint, Record, atomic_folder
from moekit.checkpoint.safety import check_name
from moekit.errors import BadCheckpoint, BadConfig, UnsafeInput


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
    """Find the parent of a checkpoint here and prove that it is the one that the record names; nothing is fetched.

    Raises:
        BadConfig: the folder has no record, or the record names no parent, or not what proves it.
        BadCheckpoint: the parent is gone, or is no longer what it was.
        UnsafeInput: the parent holds links that lead out of it.
    """
    folder = Path(folder)
    record = Record.read(folder)
    if record is None:
        raise BadConfig(
            "there is no moekit.json here, so nothing to undo", file=folder, hint="give a folder moekit wrote"
        )
    if record.parent is None:
        raise BadConfig("its record names no parent", file=folder, hint="it was made from nothing")
    if not record.parent_fingerprint:
        raise BadConfig(
            f"its record does not say what its parent {record.parent!r} was, so nothing proves which folder that is",
            file=folder,
            hint="copy the parent here yourself if you know it",
        )
    try:
        # A record is a stranger's: it must not make us fetch what it names, nor follow a name from folder to folder.
        here = Path(record.parent)
        parent = Checkpoint.open(here if here.is_absolute() else record.parent, local_files_only=True)
    except BadCheckpoint as error:
        hint = "bring it back to where it was; a hub model must be in the cache here, for undo fetches nothing"
        raise BadCheckpoint(
            f"its parent {record.parent} cannot be opened: {error.message}", file=folder, hint=hint
        ) from error
    if parent.fingerprint != record.parent_fingerprint:
        raise BadCheckpoint(
            f"this is no longer the parent of {folder}: its fingerprint is {parent.fingerprint[:12]}, "
            f"the record says {record.parent_fingerprint[:12]}",
            file=parent.path,
            hint="restore the parent from a copy",
        )
    nbytes = sum(file.stat().st_size for file, _ in _files(parent.path))
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
    found, keep = find_parent(folder), Path(keep)
    if keep.exists():
        raise BadConfig("something is there already", file=keep, hint="move it away, or name another place (--keep)")
    changed = found.folder.stat().st_ino
    copy_folder(found.folder, keep, overwrite=False)
    try:
        copy_folder(found.parent, found.folder, overwrite=True)
    except BaseException:
        # As it was, if it still is: what was kept would stand in the way of the next try.
        if found.folder.is_dir() and found.folder.stat().st_ino == changed:
            shutil.rmtree(keep, ignore_errors=True)
        raise
    return found


def copy_folder(source: Path, target: Path, *, overwrite: bool) -> None:
    """Copy a checkpoint, whole or not at all; by hard links where the disk allows: nobody writes into its files."""
    with atomic_folder(target, overwrite=overwrite) as temporary:
        for file, name in _files(source):
            place = temporary / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.resolve(), place)
            except OSError:
                shutil.copyfile(file, place)


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """All files of a checkpoint, with their names in it; links that stay inside are followed.

    Raises:
        UnsafeInput: a link that leads out of the folder, a linked folder, a pipe or device.
    """
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in folders:
            if Path(root, name).is_symlink():
                raise UnsafeInput(
                    f"{name!r} is a link to a folder", file=root, hint="put a copy in its place if you trust it"
                )
        for name in sorted(names):
            relative = Path(root, name).relative_to(folder).as_posix()
            yield check_name(folder, relative), relative
