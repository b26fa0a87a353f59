"""One readable message and an exit code for everything that can go wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from moekit._memory import is_out_of_memory
from moekit.errors import BadConfig, Interrupted, MoekitError, OutOfBudget, printable, shortened

if TYPE_CHECKING:
    from pydantic import ValidationError

USAGE = 2
RESOURCES = OutOfBudget.exit_code
INTERRUPTED = Interrupted.exit_code


@dataclass(frozen=True)
class Explanation:
    """What a user is told of a failure."""

    kind: str
    message: str
    hint: str | None
    exit_code: int


def config_error(error: ValidationError, where: str = "") -> BadConfig:
    """Say with the path of each key what pydantic found.

    Args:
        error: pydantic's list of faults.
        where: what was being read, such as the name of a method.
    """
    from moekit._validation import faults

    head = f"{where}: " if where else ""
    return BadConfig(head + faults(error), hint="--help lists every option with its unit and bounds")


def _of_system(error: OSError) -> Explanation:
    name = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Explanation("OutOfBudget", f"{where}{name}", "free some space or choose another folder", RESOURCES)
    if isinstance(
        error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError | FileExistsError
    ):
        return Explanation("BadConfig", f"{where}{name}", "check the path and its permissions", USAGE)
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL) and error.filename:
        return Explanation("BadConfig", f"{where}{name}", "this names no file that can be there; check it", USAGE)
    return Explanation(type(error).__name__, f"{where}{name}", None, 1)


def understand(error: BaseException) -> Explanation:
    """Name a failure and its exit code."""
    if isinstance(error, MoekitError):
        text, _, _ = str(error).partition("\n  -> ")
        return Explanation(type(error).__name__, text, error.hint, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        hint = "nothing is half-written; the same command goes on where what it had done was kept, or starts over"
        return Explanation("Interrupted", "interrupted", hint, INTERRUPTED)
    if is_out_of_memory(error):
        hint = "use a smaller batch or sequence, or a machine with more memory; `moekit estimate` says what is needed"
        return Explanation("OutOfBudget", f"out of memory: {error}".rstrip(": "), hint, RESOURCES)
    if hasattr(error, "format_message"):  # typer's own usage errors
        command = getattr(getattr(error, "ctx", None), "command_path", "moekit")
        return Explanation(
            "usage", error.format_message(), f"{command} --help shows every option and an example", USAGE
        )
    if type(error).__name__ == "ValidationError" and type(error).__module__.startswith("pydantic"):
        return understand(config_error(error))  # type: ignore[arg-type]
    if isinstance(error, OSError):
        return _of_system(error)
    hint = "this is a fault of moekit or of a library under it: --debug shows where"
    return Explanation(type(error).__name__, str(error) or "no message", hint, 1)


def explain(error: BaseException, *, debug: bool = False, as_json: bool = False) -> int:
    """Print what happened on stderr (and as JSON on stdout where asked) and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if type(error).__name__ == "NoArgsIsHelpError":
        print(getattr(error, "format_message", lambda: "")(), file=sys.stderr)
        return USAGE
    told = understand(error)
    if debug:
        print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    _print_error(told)
    if as_json:
        fields = {key: getattr(error, key, None) for key in ("file", "layer", "expert")}
        body = {"type": told.kind, "message": told.message, "hint": told.hint, "exit_code": told.exit_code, **fields}
        print(json.dumps({"error": body}))
    return told.exit_code


def _print_error(told: Explanation) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), shortened(told.message)))
    if told.hint:
        console.print(Text.assemble(("  -> ", "dim"), shortened(told.hint)))


def reopen_closed() -> None:
    """Give closed standard streams (`>&-`) nothing to write to: else the next file that is opened would be one."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115


def install_signals() -> None:
    """Let a polite kill end a command as Ctrl-C does: clean up, then 130."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


class _Lines(logging.StreamHandler[TextIO]):
    """Our own handler, recognisable so that it is never there twice."""


class _ByLevel(logging.Formatter):
    """`warning: ...` or `error: ...`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(f"{'error' if record.levelno >= logging.ERROR else 'warning'}: {record.getMessage()}")


def _printable_records() -> None:
    """Make what libraries under us log of a stranger's config as printable as what we say ourselves."""
    make = logging.getLogRecordFactory()
    if getattr(make, "printable", False):
        return

    def made(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        with contextlib.suppress(Exception):  # a library's faulty format is its own affair
            text = record.getMessage()
            if printable(text) != text:
                record.msg, record.args = printable(text), ()
        return record

    made.printable = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)


def show_warnings() -> None:
    """Print warnings and log records of warning level as one line each on stderr."""
    _printable_records()

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        print(printable(f"warning: {message}"), file=sys.stderr)

    warnings.showwarning = show
    handler = _Lines()
    handler.setFormatter(_ByLevel())
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("moekit")
    logger.handlers = [other for other in logger.handlers if not isinstance(other, _Lines)] + [handler]
