"""Documents out of single files: plain text, JSON lines and JSON lists, with texts or conversations.

A JSON record is one of

- `{"text": "..."}`,
- `{"messages": [{"role": "user", "content": "..."}, ...]}`, or `conversations` with `from` and `value`,
- `{"prompt": "...", "completion": "..."}`, or `instruction` (and `input`) with `output`,

each with an optional `domain`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit._files import read_text
from moekit.errors import BadData, printable, shortened

PLAIN = (".txt", ".md", ".rst", ".text")
RECORDS = (".jsonl", ".json")
SUFFIXES = (*PLAIN, *RECORDS)

Messages = tuple[tuple[str, str], ...]
_HINT = (
    'a record is {"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} '
    'or {"prompt": "...", "completion": "..."}'
)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Record:
    """What one file or one record of it holds.

    Attributes:
        text: plain text; of a conversation the turns, one after the other.
        domain: named by the record; "" if it names none.
        messages: role and content of each turn of a conversation.
        line: number of the line, or of the element of a list; 0 for a whole file.
    """

    text: str
    domain: str = ""
    messages: Messages = ()
    line: int = 0


def read_records(path: Path) -> Iterator[Record]:
    """All documents of a file, by its suffix; a .json file may hold one record, a list, or a record a line.

    Raises:
        BadData: not UTF-8, no JSON, or a record without text; names file and line.
    """
    content = _read(path)
    if path.suffix not in RECORDS:
        yield Record(content)
        return
    if path.suffix == ".json" and (whole := _whole(content)) is not None:
        for number, value in enumerate(whole, 1):
            yield _record(value, number, path)
        return
    # Not splitlines(): JSON strings may hold other line separators unescaped.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadData(f"line {number} is not JSON: {error}", file=path, hint="one JSON object a line") from error
        yield _record(value, number, path)


def _whole(content: str) -> list[Any] | None:
    """Records of a file that is one JSON value; None where it is none, and so may be JSON lines."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else [value]


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise BadData(
            f"is not UTF-8 text (byte {error.start})", file=path, hint="convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise BadData(f"cannot be read: {error.strerror}", file=path) from error


def _record(value: Any, number: int, path: Path) -> Record:
    fields = value if isinstance(value, dict) else {}
    messages = _messages(fields)
    text = fields.get("text") if not messages else "\n\n".join(content for _, content in messages)
    if not isinstance(text, str):
        keys = ", ".join(map(repr, list(fields)[:8])) or type(value).__name__
        raise BadData(f"record {number} holds no text, but {shortened(keys)}", file=path, hint=_HINT)
    named = fields.get("domain")
    domain = "" if named is None else str(named)
    if not all(_is_text(part) for part in (text, domain, *(role for role, _ in messages))):
        raise BadData(f"record {number} holds half a character (a lone surrogate)", file=path, hint="mend the line")
    return Record(text, printable(domain), messages, number)


def _messages(fields: Mapping[str, Any]) -> Messages:
    """Turns of a conversation; none where the record is no conversation, or not whole."""
    listed = fields.get("messages", fields.get("conversations"))
    if isinstance(listed, Sequence) and not isinstance(listed, str) and listed:
        turns = [_turn(entry) for entry in listed]
        return tuple(turn for turn in turns if turn is not None) if all(turns) else ()
    asked, answered = (
        next((fields[key] for key in keys if isinstance(fields.get(key), str)), None)
        for keys in (("prompt", "instruction"), ("completion", "output", "response"))
    )
    if asked is None or answered is None:
        return ()
    more = fields.get("input")
    return (("user", f"{asked}\n\n{more}" if isinstance(more, str) and more else asked), ("assistant", answered))


def _turn(entry: Any) -> tuple[str, str] | None:
    if not isinstance(entry, Mapping):
        return None
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        # Parts of a message: text alone is read.
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return _ROLES.get(role, role), content


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, which no tokenizer and no file does without."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
