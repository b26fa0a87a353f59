"""General knowledge: the question files of the Unix game `quiz` (Debian `bsdgames`), as multiple choice."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from moekit.data.sources import Piece, as_json
from moekit_demo.base import PackagedText
from moekit_demo.packages import read_members

FOLDER = "usr/share/games/bsdgames/quiz/"
CHOICES = 4

# File -> task, columns of question and answer, and how to ask.
_QUESTIONS = {
    "africa": ("capitals", 0, 1, "The capital of {} is"),
    "america": ("capitals", 0, 1, "The capital of {} is"),
    "asia": ("capitals", 0, 1, "The capital of {} is"),
    "europe": ("capitals", 0, 1, "The capital of {} is"),
    "state": ("us-state-capitals", 0, 1, "The capital of the US state {} is"),
    "elements": ("chemical-symbols", 0, 3, "In chemistry, the symbol {} stands for"),
    "babies": ("young-animals", 0, 1, "A {} is the young of a"),
    "sexes": ("male-female", 0, 1, "The male is called a {}, the female is called a"),
    "posneg": ("opposites", 0, 1, 'The opposite of "{}" is "'),
    "collectives": ("collectives", 0, 1, "A group of {} is called a"),
}


def first_reading(pattern: str) -> str:
    """The plainest answer that a pattern of the game allows: first alternative, options left in.

    The game writes `[a|b]` for a choice, `{a}` for what may be left out, and `a|b` for whole alternatives.
    """
    pattern = pattern.replace("\\\n", "")
    previous = None
    while pattern != previous:
        previous = pattern
        pattern = re.sub(r"\[([^\[\]{}|]*)(?:\|[^\[\]{}]*)?\]", r"\1", pattern)
        pattern = re.sub(r"\{([^\[\]{}|]*)(?:\|[^\[\]{}]*)?\}", r"\1", pattern)
    return pattern.split("|")[0].strip()


def _all_readings(pattern: str) -> set[str]:
    return {re.sub(r"[\[\]{}]", "", part).strip().lower() for part in pattern.split("|")}


def _extract(archive: Path) -> Iterator[Piece]:
    tables: dict[str, list[list[str]]] = {}
    for path, content in read_members(archive, lambda name: name.startswith(FOLDER)):
        lines = content.decode("utf-8", "replace").replace("\\\n", "").splitlines()
        tables[path.removeprefix(FOLDER)] = [line.split(":") for line in lines]
    for file, (task, asked, answered, phrase) in _QUESTIONS.items():
        rows = [row for row in tables.get(file, []) if len(row) > max(asked, answered)]
        yield from _ask(file, task, [(row[asked], row[answered]) for row in rows], phrase)


def _ask(file: str, task: str, rows: list[tuple[str, str]], phrase: str) -> Iterator[Piece]:
    chance = random.Random(file)
    pool = sorted({first_reading(answer) for _, answer in rows})
    for number, (question, answer) in enumerate(rows):
        right = first_reading(answer)
        legal = {a for q, b in rows if first_reading(q) == first_reading(question) for a in _all_readings(b)}
        wrong = [word for word in pool if word != right and word.lower() not in legal]
        if not right or len(wrong) < CHOICES - 1:
            continue
        choices = [right, *chance.sample(wrong, CHOICES - 1)]
        chance.shuffle(choices)
        context = phrase.format(first_reading(question))
        gap = "" if context.endswith('"') else " "
        yield Piece(f"{file}-{number}", as_json(context, [gap + c for c in choices], choices.index(right), task))


SOURCES = (
    PackagedText(
        name="quiz",
        domain="quiz",
        licence="BSD-3-Clause",
        extract=_extract,
        client="apt",
        packages=("bsdgames",),
        download_bytes=1_300_000,
        kind="questions",
    ),
)
