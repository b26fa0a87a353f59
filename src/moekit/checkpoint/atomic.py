"""Write whole or not at all: folders and files appear complete under their final name, or not.

A folder is written beside its target under a temporary name, flushed to disk, and swapped in by one system call.
Whatever kills the process, the target is the old folder or the new one; what is left over is removed on the next use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from moekit._files import open_own
from moekit.errors import BadConfig, MoekitError, OutOfBudget

LOCK_WAIT_SECONDS = 2.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, a quota or a file-size limit is exhausted, also in safetensors' words."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error)
    return type(error).__name__ == "SafetensorError" and any(f"os error {number})" in text for number in _FULL)


def _out_of_disk(folder: Path, needed: int | None, cause: BaseException | None) -> OutOfBudget:
    free = shutil.disk_usage(folder).free
    need = f"{needed:,} bytes are needed" if needed is not None else f"writing failed ({cause})"
    return OutOfBudget(
        f"the disk is full: {need}, {free:,} bytes are free",
        file=folder,
        hint="free some space or write to another disk; nothing was changed",
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_parent(path: Path) -> None:
    """Make a rename durable; if that fails, what was written is complete all the same."""
    with contextlib.suppress(OSError):
        _fsync(path.parent)


def settle(folder: Path) -> None:
    """Give every file of a folder that we made the mode that the umask asks for, and flush all to disk.

    Libraries write through private temporary files, so that what they leave could be read by its owner alone. Files
    that have further names elsewhere keep their mode.
    """
    # What the umask left of the folder's own mode says what it leaves of a file's.
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
                path.chmod(mode)
            _fsync(path)
        _fsync(Path(root))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def lock(target: Path, wait: float | None = None) -> Iterator[None]:
    """Hold the writer's lock of a target; the operating system releases it when the process dies.

    Raises:
        BadConfig: another process still holds it after `wait` seconds (`LOCK_WAIT_SECONDS`).
        UnsafeInput: a link, or no plain file, has the lock's name.
    """
    path = target.parent / f".{target.name}.moekit-lock"
    deadline = time.monotonic() + (LOCK_WAIT_SECONDS if wait is None else wait)
    while True:
        descriptor = open_own(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file between our open and our lock.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
            os.close(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise BadConfig(
                    f"process {holder} is writing this folder",
                    file=target,
                    hint="wait for it, end it, or choose another output folder",
                ) from None
            time.sleep(0.05)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux `renameat2`); False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    result = function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _swap_in(temporary: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.rename(temporary, target)  # onto nothing, or onto an empty folder: one step
    elif _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)  # the old folder; what resists is removed on the next use
    else:
        # Two steps; `_recover` completes them if the process dies in between.
        old = target.parent / f".{target.name}.moekit-old-{os.getpid()}"
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    _fsync_parent(target)


def _recover(target: Path) -> None:
    """Remove what killed runs left, and give back a folder that was moved aside but not yet replaced."""
    for old in sorted(target.parent.glob(f".{_escape(target.name)}.moekit-old-*")):
        if target.exists() or old.is_symlink():
            _remove(old)
        else:
            os.rename(old, target)
    for temporary in target.parent.glob(f".{_escape(target.name)}.moekit-tmp-*"):
        _remove(temporary)


def _remove(path: Path) -> None:
    """Remove a folder, or whatever else has its name; never what a link leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def check_apart(target: Path, source: Path) -> None:
    """Refuse to write over what is read, over a folder that holds it, or into it.

    Args:
        target: what is to be written.
        source: what is read.

    Raises:
        BadConfig: naming both.
    """
    real, read = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if real == read or real in read.parents:
        raise BadConfig(
            f"this would replace {source}, which is read", file=target, hint="choose another place to write to"
        )
    if read in real.parents:
        raise BadConfig(
            f"this lies in {source}, which is read", file=target, hint="choose a place beside it to write to"
        )


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise BadConfig("a file of this name is in the way", file=target, hint="choose another output folder")
    if os.path.ismount(target):
        raise BadConfig(
            "this is a mount point, which no finished folder can be swapped into",
            file=target,
            hint=f"write to a folder inside it, such as {target / 'out'}",
        )
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise BadConfig("the folder exists", file=target, hint="choose another one, or say --overwrite")
    here, home = Path.cwd(), Path(os.path.expanduser("~"))
    if target in {here, *here.parents, home, *home.parents} or (target / ".git").exists():
        raise BadConfig(
            "this folder holds more than a model and is not overwritten", file=target, hint="choose a folder of its own"
        )


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(
            f"the folder cannot be made: {error.strerror}", file=target.parent, hint="choose another output folder"
        ) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BadConfig("no permission to write here", file=target.parent, hint="choose another output folder")


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, overwrite: bool = False, need_bytes: int | None = None) -> Iterator[Path]:
    """Write a folder whole or not at all.

    Args:
        target: final folder; its parents are made.
        overwrite: whether an existing folder may be replaced (at the very end, in one step).
        need_bytes: what will be written; checked against the free space first.

    Yields:
        A temporary folder beside the target to write into.

    Raises:
        BadConfig: the folder exists, or another process is writing it.
        OutOfBudget: the disk is full, or would be; nothing is left behind.
    """
    target = Path(os.path.realpath(target))
    _make_parent(target)
    with lock(target):
        _recover(target)
        _check_target(target, overwrite)
        if need_bytes is not None and need_bytes > shutil.disk_usage(target.parent).free:
            raise _out_of_disk(target.parent, need_bytes, None)
        temporary = target.parent / f".{target.name}.moekit-tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.mkdir()
            yield temporary
            settle(temporary)
            _swap_in(temporary, target)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_disk_full(error):
                raise _out_of_disk(target.parent, need_bytes, error) from error
            name_target(error, temporary, target)
            raise


def name_target(error: BaseException, temporary: Path, target: Path) -> None:
    """Let an error speak of the folder that was to be written: the one under the hidden name is gone.

    Args:
        error: changed in place.
        temporary: the hidden folder.
        target: what was to be written.
    """
    if isinstance(error, MoekitError):
        for name in ("file", "message", "hint"):
            if (text := getattr(error, name)) is not None:
                setattr(error, name, text.replace(str(temporary), str(target)))
        error.args = (error.message,)
    elif isinstance(error, OSError) and isinstance(error.filename, str):
        error.filename = error.filename.replace(str(temporary), str(target))


def _clean_dead_files(path: Path) -> None:
    """Remove temporary files of this target whose process is gone."""
    for old in path.parent.glob(f".{_escape(path.name)}.moekit-tmp-*"):
        pid = old.name.rpartition(".moekit-tmp-")[2].split("-")[0]
        if old.is_file() and pid.isdigit() and not _alive(int(pid)):
            old.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all (temporary file, flush, rename).

    Raises:
        OutOfBudget: the disk is full; the old file is untouched.
    """
    path = Path(path)
    _make_parent(path)
    _clean_dead_files(path)
    temporary = path.parent / f".{path.name}.moekit-tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with os.fdopen(open_own(temporary), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise _out_of_disk(path.parent, len(data), error) from error
        raise
    _fsync_parent(path)
