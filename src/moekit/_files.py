"""Open files that others wrote or named: plain files only, and never through a link where something is written.

Opening a pipe waits for its other end, reading a device may never end, and a link under a name that can be guessed
makes a writer destroy what it leads to. Every reader of a user's files goes through `open_regular`, every writer under
a name that can be guessed through `open_own`.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from moekit.errors import UnsafeInput


def require_regular(path: str | Path) -> os.stat_result:
    """What a file is, links followed, if it is a plain one.

    Raises:
        UnsafeInput: a pipe, socket or device.
        OSError: nothing there, a folder, or no permission.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeInput(
            "this is no regular file: pipes, sockets and devices are not read",
            file=path,
            hint="write what it gives into a file, and name that",
        )
    return found


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a plain file for reading, links followed.

    Raises:
        UnsafeInput: a pipe, socket or device.
        OSError: nothing there, a folder, or no permission.
    """
    # Before it is opened: opening a pipe wakes its writer. And after: it may have been exchanged.
    require_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnsafeInput("this is no regular file any more", file=path, hint="name a file that stays what it is")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, *, limit: int | None = None) -> bytes:
    """All bytes of a plain file.

    Args:
        path: of the file.
        limit: most bytes that are read.

    Raises:
        UnsafeInput: a pipe, socket or device, or more bytes than `limit`.
        OSError: nothing there, a folder, or no permission.
    """
    with open_regular(path) as file:
        data = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise UnsafeInput(f"more than the {limit:,} bytes that are read", file=path, hint="this is no such file")
    return data


def read_text(path: str | Path, *, limit: int | None = None) -> str:
    """A plain file's text, with the line ends as `open` gives them; see `read_bytes`.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path, limit=limit).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def open_own(path: str | Path, flags: int = os.O_WRONLY) -> int:
    """Open a file of our own for writing under a name that others can guess; made by the umask, not truncated.

    Args:
        path: its last part must not be a link.
        flags: os.O_WRONLY or os.O_RDWR.

    Returns:
        A descriptor.

    Raises:
        UnsafeInput: a link, also a hard one, or no plain file: what it leads to would be overwritten.
        OSError: it cannot be made.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO) or os.path.islink(path):
            raise _not_ours(path) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _not_ours(path)
    return descriptor


def _not_ours(path: str | Path) -> UnsafeInput:
    return UnsafeInput(
        "this is a link, or no regular file: writing here would change what it leads to",
        file=path,
        hint="remove it if you know where it comes from, or write to another folder",
    )


def require_own_folder(folder: str | Path) -> None:
    """Refuse a folder for half-done work, under a name that can be guessed, into which somebody has put links.

    Raises:
        UnsafeInput: it is a link, or holds links, pipes or files that have further names.
    """
    if os.path.islink(folder):
        raise _not_ours(folder)
    for root, folders, files in os.walk(folder):
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                raise _not_ours(os.path.join(root, name))
        for name in files:
            try:
                found = os.lstat(os.path.join(root, name))
            except FileNotFoundError:  # another rank of the same run has just renamed it
                continue
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise _not_ours(os.path.join(root, name))
