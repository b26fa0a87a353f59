"""Parse JSON that strangers wrote: UTF-8 only, size and depth capped, duplicate keys refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moekit._files import read_bytes
from moekit.errors import BadCheckpoint, MoekitError, UnsafeInput

MAX_INDEX_BYTES = 100_000_000
MAX_CONFIG_BYTES = 10_000_000
MAX_JSON_DEPTH = 32


class _Duplicate(ValueError):
    """A JSON object has the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise _Duplicate(f"keys given twice: {', '.join(map(repr, twice[:10]))}")
    return result


def _depth(value: Any) -> int:
    """Levels of nesting.

    Raises:
        UnicodeEncodeError: a key or text holds half a surrogate pair, which no file name, digest or terminal can take.
    """
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(item, str):
            _ = item.isascii() or item.encode()
            continue
        children = [*item.keys(), *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack.extend((child, depth + 1) for child in children)
    return deepest


def parse_json(text: bytes, path: Path, *, what: str, error: type[MoekitError] = BadCheckpoint) -> dict[str, Any]:
    """Parse a JSON object; duplicate keys, absurd depth and anything but an object raise `error`."""
    try:
        # Not the bytes: Python would take UTF-16 and UTF-32 for JSON, too, which no other reader of these files does.
        value = json.loads(text.decode(), object_pairs_hook=_unique)
        depth = _depth(value)
    except _Duplicate as duplicate:
        raise error(f"{what} has {duplicate}", file=path, hint="fetch the file again from its source") from None
    except RecursionError:
        raise UnsafeInput(f"{what} is nested beyond all reason", file=path, hint="do not use this model") from None
    except UnicodeEncodeError as half:
        held = half.object[max(0, half.start - 20) : half.end]
        raise error(f"{what} holds {held!r}, half a character", file=path, hint="fetch the file again") from None
    except ValueError as broken:
        raise error(f"{what} is not valid JSON: {broken}", file=path, hint="fetch the file again") from None
    if not isinstance(value, dict):
        raise error(f"{what} is no JSON object", file=path, hint="fetch the file again")
    if depth > MAX_JSON_DEPTH:
        raise UnsafeInput(
            f"{what} is nested deeper than {MAX_JSON_DEPTH} levels", file=path, hint="do not use this model"
        )
    return value


def read_json(path: Path, *, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes.

    Raises:
        BadCheckpoint: missing, or not valid JSON.
        UnsafeInput: too large or too deep.
    """
    try:
        size = path.stat().st_size
    except OSError:
        raise BadCheckpoint("the file is missing", file=path, hint="fetch the model folder again") from None
    if size > limit:
        raise UnsafeInput(f"{size} bytes of JSON; at most {limit} are read", file=path, hint="do not use this model")
    return parse_json(read_bytes(path, limit=limit), path, what="the file")
