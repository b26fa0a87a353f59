"""Where fetched text and models are kept, and how they get there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moekit.errors import OutOfBudget

HOME_VARIABLE = "MOEKIT_HOME"


def home() -> Path:
    """The cache folder: $MOEKIT_HOME, else ~/.cache/moekit."""
    chosen = os.environ.get(HOME_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "moekit"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sweep(parent: Path) -> None:
    # A killed fetch leaves its temporary folder; the process number in its name says whether anyone still uses it.
    for leftover in parent.glob(".part-*"):
        pid = leftover.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error.

    Two processes may fetch the same thing at once: each works in its own folder, the first to end wins and the other's
    copy is thrown away.

    Raises:
        OutOfBudget: the disk is full; nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = Path(tempfile.mkdtemp(prefix=f".part-{os.getpid()}-", dir=target.parent))
    try:
        yield part
        _sync(part)
        try:
            part.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfBudget(
                f"the disk is full ({shutil.disk_usage(target.parent).free:,} bytes free)",
                file=target,
                hint=f"free some space, or point ${HOME_VARIABLE} to a larger disk",
            ) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a folder for downloads that is removed at the end, and swept later if the process is killed.

    It lies on the cache's disk: the system's temporary folder may be a small piece of memory.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".part-{os.getpid()}-", dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(folder: Path) -> None:
    # mkdtemp makes the folder private; the cache is an ordinary folder.
    folder.chmod(0o755)
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o644)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
