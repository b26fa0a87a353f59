"""Multiple-choice questions: from local files in the usual formats, from packages, or made from held-out text."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

from moekit._progress import Progress
from moekit.data.continuations import continuation_questions
from moekit.data.question_formats import Question, read_question_file
from moekit.data.sources import all_sources, get_source, question_mixes
from moekit.data.text import load_text
from moekit.errors import BadConfig, BadData

__all__ = ["Question", "load_questions"]

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv")
CONTINUATIONS = "continuations:"
CONTINUATIONS_PER_DOMAIN = 100


def load_questions(
    spec: str, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None
) -> list[Question]:
    """Load questions.

    Args:
        spec: a file (instruction/answer JSON as for PIQA, ARC, BoolQ and WinoGrande; MMLU CSV; BLiMP JSONL; JSONL of
            question, choices and answer) or a folder of such, told apart by content; the name of a source ("analogies",
            "quiz"); `continuations:TEXT`, made from the held-out part of any text that `load_text` knows; the mix
            "demo"; or several joined by `+`.
        limit: at most so many of each task, drawn at random; None for all.
        seed: of the drawing.
        progress: told of downloads.

    Returns:
        Questions, task by task.

    Raises:
        BadData: nothing there, or a damaged file; names file and record.
        BadConfig: an impossible limit.
    """
    if limit is not None and limit < 1:
        raise BadConfig(f"a limit of {limit} leaves no question", hint="give at least 1, or leave it out")
    by_task: dict[str, list[Question]] = {}
    for part in spec.split("+"):
        for question in _load_part(part.strip(), limit, seed, progress):
            by_task.setdefault(question.task, []).append(question)
    if not by_task:
        raise BadData(f"{spec!r} holds no question")
    chosen: list[Question] = []
    for task, questions in by_task.items():
        if limit is not None and len(questions) > limit:
            kept = sorted(random.Random(f"{seed} {task}").sample(range(len(questions)), limit))
            questions = [questions[i] for i in kept]
        chosen += questions
    return chosen


def _load_part(spec: str, limit: int | None, seed: int, progress: Progress | None) -> Iterator[Question]:
    path = Path(spec).expanduser()
    if spec in question_mixes():
        for candidates in question_mixes()[spec]:
            yield from _first(candidates, limit, seed, progress)
    elif spec.startswith(CONTINUATIONS):
        documents = load_text(spec.removeprefix(CONTINUATIONS), split="heldout", progress=progress)
        yield from continuation_questions(documents, limit or CONTINUATIONS_PER_DOMAIN, seed)
    elif spec in all_sources():
        source = get_source(spec)
        if source.info().kind != "questions":
            raise BadData(f"the source {spec!r} holds no questions", hint=f"perhaps {CONTINUATIONS}{spec}")
        for piece in source.pieces(progress):
            fields = json.loads(piece.text)
            yield Question(fields["context"], tuple(fields["choices"]), fields["answer"], fields["task"])
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        if not files:
            raise BadData(f"the folder holds no {', '.join(SUFFIXES)} file", file=path)
        for file in files:
            yield from read_question_file(file)
    elif path.is_file():
        yield from read_question_file(path)
    else:
        raise BadData(
            f"{spec!r} is no file, folder or source of questions",
            hint="give a path, or one of: "
            + ", ".join([*question_mixes(), *(i for i, s in all_sources().items() if s.info().kind == "questions")])
            + f", {CONTINUATIONS}TEXT",
        )


def _first(candidates: tuple[str, ...], limit: int | None, seed: int, progress: Progress | None) -> list[Question]:
    for candidate in candidates[:-1]:
        try:
            return list(_load_part(candidate, limit, seed, progress))
        except BadData as error:
            logger.warning("%s: %s", candidate, error.message)
    try:
        return list(_load_part(candidates[-1], limit, seed, progress))
    except BadData as error:
        if len(candidates) == 1:
            raise
        logger.warning("no questions from %s: %s", " or ".join(candidates), error.message)
        return []
