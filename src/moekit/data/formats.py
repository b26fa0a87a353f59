"""Documents out of single files: plain text, JSON lines and JSON lists, with texts or conversations.

A JSON record is one of

- `{"text": "..."}`,
- `{"messages": [{"role": "user", "content": "..."}, ...]}`, or `conversations` with `from` and `value`,
- `{"prompt": "...", "completion": "..."}`, or `instruction` (and `input`) with `output`,

each with an optional `domain`. A message may show pictures: its content is then a list of parts, `{"type": "text",
"text": "..."}` and `{"type": "image", "path": "photo.jpg"}` (or `image`, `url`, `image_url`, with a path, a `file:`
address, or the picture itself as a `data:` address); or the record has `image` or `images` beside its messages, which
say `<image>` where they belong. Paths are read from the folder of the file that names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from moekit._files import read_text
from moekit.errors import BadData, printable, shortened

PLAIN = (".txt", ".md", ".rst", ".text")
RECORDS = (".jsonl", ".json")
SUFFIXES = (*PLAIN, *RECORDS)
# Files that conversations show; they are no text by themselves.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """A picture in a conversation.

    Attributes:
        source: path of a file, or a `data:` address that holds it.
    """

    source: str


Content: TypeAlias = str | tuple[str | Picture, ...]
# Role and content of each turn: plain text, or text and pictures in their order.
Messages: TypeAlias = tuple[tuple[str, Content], ...]
_HINT = (
    'a record is {"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} '
    'or {"prompt": "...", "completion": "..."}'
)
_PLACE = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Record:
    """What one file or one record of it holds.

    Attributes:
        text: plain text; of a conversation the turns, one after the other.
        domain: named by the record; "" if it names none.
        messages: role and content of each turn of a conversation, text or text and pictures.
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
    messages = _placed(_messages(fields, path.parent), fields, number, path)
    text = fields.get("text") if not messages else "\n\n".join(words(content) for _, content in messages)
    if not isinstance(text, str):
        keys = ", ".join(map(repr, list(fields)[:8])) or type(value).__name__
        raise BadData(f"record {number} holds no text, but {shortened(keys)}", file=path, hint=_HINT)
    named = fields.get("domain")
    domain = "" if named is None else str(named)
    if not all(_is_text(part) for part in (text, domain, *(role for role, _ in messages))):
        raise BadData(f"record {number} holds half a character (a lone surrogate)", file=path, hint="mend the line")
    return Record(text, printable(domain), messages, number)


def words(content: Content) -> str:
    """What a turn says, its pictures left out."""
    return content if isinstance(content, str) else "\n".join(part for part in content if isinstance(part, str))


def _placed(messages: Messages, fields: Mapping[str, Any], number: int, path: Path) -> Messages:
    """Turns with the pictures that the record lists beside them where they say `<image>`.

    Raises:
        BadData: another number of pictures than places for them.
    """
    listed = fields.get("images", fields.get("image"))
    named = [listed] if isinstance(listed, str | Mapping) else listed
    if not messages or not isinstance(named, Sequence) or not named:
        return messages
    found = [_picture({"image": one} if isinstance(one, str) else one, path.parent) for one in named]
    places = sum(content.count(_PLACE) for _, content in messages if isinstance(content, str))
    if None in found or places != len(found):
        raise BadData(
            f"record {number} lists {len(found)} pictures, and its messages say {_PLACE} {places} times",
            file=path,
            hint=f"one {_PLACE} in the messages for each picture, and a path or a data: address for each",
        )
    left = iter([one for one in found if one is not None])
    return tuple((role, _woven(content, left)) for role, content in messages)


def _woven(content: Content, pictures: Iterator[Picture]) -> Content:
    if not isinstance(content, str) or _PLACE not in content:
        return content
    parts: list[str | Picture] = []
    for place, text in enumerate(content.split(_PLACE)):
        parts += [next(pictures)] if place else []
        parts += [text.strip("\n")] if text.strip() else []
    return tuple(parts)


def _picture(part: Mapping[str, Any], folder: Path) -> Picture | None:
    """The picture that a part of a message shows; None where it shows none, or does not say where it lies."""
    value = next((part[key] for key in ("path", "image", "url", "image_url") if part.get(key)), None)
    value = next((value[key] for key in ("path", "url") if value.get(key)), None) if isinstance(value, dict) else value
    if not isinstance(value, str):
        return None
    if value.startswith(("data:", "http:", "https:")):
        return Picture(value)
    return Picture(str(folder / Path(value.removeprefix("file://")).expanduser()))


def _messages(fields: Mapping[str, Any], folder: Path) -> Messages:
    """Turns of a conversation; none where the record is no conversation, or not whole."""
    listed = fields.get("messages", fields.get("conversations"))
    if isinstance(listed, Sequence) and not isinstance(listed, str) and listed:
        turns = [_turn(entry, folder) for entry in listed]
        return tuple(turn for turn in turns if turn is not None) if all(turns) else ()
    asked, answered = (
        next((fields[key] for key in keys if isinstance(fields.get(key), str)), None)
        for keys in (("prompt", "instruction"), ("completion", "output", "response"))
    )
    if asked is None or answered is None:
        return ()
    more = fields.get("input")
    return (("user", f"{asked}\n\n{more}" if isinstance(more, str) and more else asked), ("assistant", answered))


def _turn(entry: Any, folder: Path) -> tuple[str, Content] | None:
    if not isinstance(entry, Mapping):
        return None
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [_part(part, folder) for part in content if isinstance(part, Mapping)]
        kept = tuple(part for part in parts if part is not None)
        content = kept if any(isinstance(part, Picture) for part in kept) else words(kept)
    if not isinstance(role, str) or not isinstance(content, str | tuple):
        return None
    return _ROLES.get(role, role), content


def _part(part: Mapping[str, Any], folder: Path) -> str | Picture | None:
    """Text or picture; None for what is neither, such as sound."""
    if isinstance(part.get("text"), str):
        return str(part["text"])
    return _picture(part, folder) if str(part.get("type", "")).startswith("image") else None


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, which no tokenizer and no file does without."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
