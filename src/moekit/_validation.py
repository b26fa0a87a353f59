"""What pydantic refused, in moekit's own errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from moekit._files import read_bytes
from moekit.errors import BadData, MoekitError

_LONGEST = 80
MAX_ARTEFACT_BYTES = 256 << 20

M = TypeVar("M", bound=BaseModel)


def faults(error: ValidationError, most: int | None = None) -> str:
    """All that pydantic found, each with the path of its key and what was given.

    Args:
        error: pydantic's list of faults.
        most: how many to name.
    """
    lines = []
    for fault in error.errors(include_url=False)[:most]:
        path = ".".join(map(str, fault["loc"])) or "value"
        given = "" if fault["type"] in ("missing", "extra_forbidden") else f" (given: {_short(fault.get('input'))})"
        lines.append(f"{path}: {fault['msg']}{given}")
    return "; ".join(lines)


def parse(cls: type[M], value: Any, *, what: str, file: str | Path, hint: str, kind: type[MoekitError] = BadData) -> M:
    """An artefact from what its file holds.

    Args:
        cls: what it should be.
        value: the file's bytes, or what their JSON says.
        what: what a user calls it.
        file: where it was read.
        hint: the way out.
        kind: class of the error.

    Raises:
        MoekitError: of `kind`: it is damaged; names the first fault.
    """
    try:
        return cls.model_validate_json(value) if isinstance(value, bytes) else cls.model_validate(value)
    except ValidationError as error:
        raise kind(f"damaged {what}: {faults(error, most=1)}", file=file, hint=hint) from error


def parse_file(
    cls: type[M],
    file: str | Path,
    *,
    what: str,
    missing: str,
    hint: str,
    limit: int = MAX_ARTEFACT_BYTES,
    kind: type[MoekitError] = BadData,
) -> M:
    """An artefact from its JSON file.

    Args:
        cls: what it should be.
        file: where it lies.
        what: what a user calls it.
        missing: the way out where there is none.
        hint: the way out of a damaged one.
        limit: most bytes that are read.
        kind: class of the error.

    Raises:
        MoekitError: of `kind`: not there, or damaged; names the first fault.
        UnsafeInput: no plain file, or too large.
    """
    try:
        value = read_bytes(file, limit=limit)
    except (OSError, ValueError) as error:
        raise kind(f"there is no {what} here", file=file, hint=missing) from error
    return parse(cls, value, what=what, file=file, hint=hint, kind=kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
