"""Reading a recipe's YAML without trusting it: capped size, depth and aliases, no tags, and the line of every key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moekit._files import read_text
from moekit.errors import BadConfig, UnsafeInput

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
# Aliases multiply: sixteen of them can at most write out a few hundred copies.
MAX_ALIASES = 16

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A YAML mapping and where its keys stand.

    Attributes:
        file: where it was read from.
        data: the mapping.
        lines: path of keys and list positions -> line, counted from 1.
    """

    file: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """Line of a key, or of the nearest thing around it that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_document(file: str | Path) -> Document:
    """Read a recipe file.

    Raises:
        BadConfig: no such file, too large, too deep, no YAML, no mapping, or a key given twice; names the line.
        UnsafeInput: the file has YAML tags, which ask for objects to be built.
    """
    file = Path(file)
    if not file.exists() or file.is_dir():
        raise BadConfig(
            "there is no such recipe", file=file, hint="`moekit run --list` names those that come with moekit"
        )
    if file.stat().st_size > MAX_BYTES:
        raise BadConfig(f"a recipe of {file.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read", file=file)
    try:
        text = read_text(file, limit=MAX_BYTES)
        _refuse_hostile(text, file)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise BadConfig("a recipe is a mapping with the keys name, out and steps", file=file)
        lines: dict[KeyPath, int] = {}
        _note_lines(node, (), lines, file)
        data = loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise BadConfig(f"is not UTF-8 text (byte {error.start})", file=file) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise BadConfig(f"{where}{getattr(error, 'problem', None) or 'cannot be read as YAML'}", file=file) from error
    return Document(file, data, lines)


def _refuse_hostile(text: str, file: Path) -> None:
    """Look at the event stream, which is built step by step, before anything is made of it."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = 1 + (event.start_mark.line if event.start_mark else 0)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UnsafeInput(f"line {line}: the YAML tag {tag!r}", file=file, hint="write plain values, without tags")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise BadConfig(f"line {line}: nested more than {MAX_DEPTH} deep", file=file)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MAX_ALIASES:
                raise BadConfig(f"line {line}: more than {MAX_ALIASES} aliases", file=file, hint="use vars instead")


def _note_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], file: Path) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _note_lines(item, (*path, position), lines, file)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise BadConfig(f"line {line}: a key must be a word", file=file)
        if name in seen:
            raise BadConfig(f"line {line}: {name!r} was given on line {seen[name]} already", file=file)
        seen[name] = line
        lines[*path, name] = line
        _note_lines(value, (*path, name), lines, file)
