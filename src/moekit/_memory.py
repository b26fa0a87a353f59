"""Running out of memory, by its name: torch, numpy and the system each say it in words of their own."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moekit.errors import OutOfBudget

_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
_MEMINFO = Path("/proc/meminfo")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory of host or device is exhausted; torch is not imported for it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # Where torch was never imported it cannot have raised.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def naming_memory(what: str, hint: str) -> Iterator[None]:
    """Let running out of memory end in one typed error; a context or a decorator.

    Args:
        what: that is being done.
        hint: the way out.

    Raises:
        OutOfBudget: memory ran out inside; naming the bytes that the machine has.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        has = machine_bytes()
        told = "" if has is None else f"; this machine has {has:,} bytes"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise OutOfBudget(f"{what} does not fit in memory: {reason}{told}", hint=hint) from error


def machine_bytes() -> int | None:
    """Memory and swap of this machine, in bytes; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        return sum(int(lines[name].split()[0]) for name in ("MemTotal", "SwapTotal")) << 10
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def require_memory(needed: int, what: str, hint: str) -> None:
    """Refuse what no part of this machine's memory can hold, before anything is allocated.

    Args:
        needed: bytes.
        what: that would need them.
        hint: the way out.

    Raises:
        OutOfBudget: naming needed and existing bytes.
    """
    has = machine_bytes()
    if has is not None and needed > has:
        raise OutOfBudget(f"{what} needs {needed:,} bytes of memory; this machine has {has:,}", hint=hint)


def return_freed_memory() -> None:
    """Give pages back to the system: glibc keeps what lies between pieces still in use, layer by layer more of it."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
