"""Every failure has a name.

Library code raises one of these and never prints or exits; `moekit.cli` turns them into one readable
message and an exit code. A message says what is wrong, *where* (file, layer, expert) and the way out (`hint`).
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

LONGEST_MESSAGE = 800
LONGEST_WORD = 300
_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
# Format characters that turn the order of what follows around: text then reads as something else.
_TURNS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""Text as a terminal may show it: what would steer the terminal, or cannot be written, stands as `\x1b`.

    Names of files, tensors and domains, prompts and answers are a stranger's. Line breaks and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return character not in "\n\t" and (unicodedata.category(character) in ("Cc", "Cs") or character in _TURNS)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Text for a message: printable, overlong words and overlong text cut in the middle, saying by how much."""
    text = _WORD.sub(lambda word: _cut(word[0], LONGEST_WORD), printable(text))
    return _cut(text, most)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail]}[... {len(text) - most:,} more characters ...]{text[-tail:]}"


class MoekitError(Exception):
    """Base of all moekit errors.

    Args:
        message: what is wrong, one sentence.
        file: the file or folder it was found in.
        layer: decoder layer index.
        expert: logical expert index.
        hint: what the user can do about it.
    """

    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        layer: int | None = None,
        expert: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(shortened(message))
        self.message = shortened(message)
        self.file = None if file is None else str(file)
        self.layer = layer
        self.expert = expert
        self.hint = None if hint is None else shortened(hint)

    def __str__(self) -> str:
        where = [
            text
            for text in (
                None if self.file is None else shortened(self.file, LONGEST_WORD),
                None if self.layer is None else f"layer {self.layer}",
                None if self.expert is None else f"expert {self.expert}",
            )
            if text
        ]
        head = f"{', '.join(where)}: {self.message}" if where else self.message
        return f"{head}\n  -> {self.hint}" if self.hint else head


class BadCheckpoint(MoekitError):
    """A model folder is damaged, incomplete or contradicts its own config."""

    exit_code = 2


class UnsupportedModel(MoekitError):
    """The model is no MoE, or its router or experts do not follow the contract."""

    exit_code = 2


class BadConfig(MoekitError):
    """A value, recipe or plan is impossible for this model; the message names the nearest legal one."""

    exit_code = 2


class BadData(MoekitError):
    """Text, questions or a trace are empty, damaged or belong to something else."""

    exit_code = 2


class NumericFault(MoekitError):
    """NaN or infinity where a finite number must be."""

    exit_code = 2


class UnsafeInput(MoekitError):
    """Pickles, remote code, paths that leave the folder, headers that lie."""

    exit_code = 3


class OutOfBudget(MoekitError):
    """Memory or disk does not suffice; the message names needed and available bytes."""

    exit_code = 4


class PeerLost(MoekitError):
    """A rank died, stalled or disagrees."""

    exit_code = 5


class Interrupted(MoekitError):
    """The user or the system asked to stop."""

    exit_code = 130
