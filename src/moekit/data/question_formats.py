"""Formats of multiple-choice files, told apart by their content.

Prompts follow the conventions of lm-evaluation-harness: "Question: ..", a line with "Answer:", then a choice that
starts with a space; letters for MMLU; whole sentences for BLiMP.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit._files import read_text
from moekit.errors import BadData

_LETTERS = "ABCDEFGHIJ"
# "Solution1: ..", "Answer2: ..", "Option1: .." inside an instruction.
_INLINE_CHOICE = re.compile(r"(?:Solution|Answer|Option|Ending)(\d+):\s*")
_TRUE_FALSE = re.compile(r"question:\s*(.*?)\s*(?:\n\s*)*Answer format:\s*true/false", re.DOTALL | re.IGNORECASE)
_GENERIC_NAMES = {"test", "train", "dev", "validation", "valid", "val", "data"}


@dataclass(frozen=True)
class Question:
    """A multiple-choice question that a language model answers by likelihood.

    Attributes:
        context: the prompt; may be empty, where whole sentences are compared.
        choices: continuations of the prompt, at least two, used as they are.
        answer: index of the right choice.
        task: name under which accuracy is reported.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    task: str

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not 0 <= self.answer < len(self.choices):
            raise BadData(
                f"a question of {self.task!r} has {len(self.choices)} choices and the answer {self.answer}",
                hint="give at least two choices, and the index of the right one",
            )


def asked(question: str, choices: Sequence[str], answer: int, task: str) -> Question:
    """A plain question and its possible answers."""
    return Question(f"Question: {question.strip()}\nAnswer:", tuple(f" {c.strip()}" for c in choices), answer, task)


def task_name(path: Path) -> str:
    """Name of a file's task: that of its folder where the file is just called "test" or the like."""
    return path.parent.name if path.stem.lower() in _GENERIC_NAMES else path.stem


def read_question_file(path: Path) -> list[Question]:
    """Read a .json, .jsonl or .csv file of questions.

    Raises:
        BadData: it is none of the known formats; names the record.
    """
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise BadData(f"is not UTF-8 text (byte {error.start})", file=path) from error
    task = task_name(path)
    if path.suffix == ".csv":
        return list(_mmlu(text, f"mmlu-{task.removesuffix('_test').removesuffix('_dev')}", path))
    records = _records(text, path)
    questions = []
    for number, record in enumerate(records, 1):
        try:
            questions.append(_convert(record, task))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, BadData) as error:
            raise BadData(
                f"record {number} is no multiple-choice question: {error}",
                file=path,
                hint='known are {"question", "choices", "answer"}, BLiMP pairs, instruction/answer records, MMLU CSV',
            ) from error
    return questions


def _records(text: str, path: Path) -> list[Any]:
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise BadData(f"is not JSON: {error}", file=path, hint="give a JSON list, or one object a line") from error


def _convert(record: dict[str, Any], task: str) -> Question:
    for key, convert in _BY_KEY.items():
        if key in record:
            return convert(record, task)
    raise KeyError(f"none of the keys {', '.join(_BY_KEY)}")


def _blimp(record: dict[str, Any], task: str) -> Question:
    pair = (str(record["sentence_good"]), str(record["sentence_bad"]))
    return Question("", pair, 0, f"blimp-{record.get('UID', task)}")


def _plain(record: dict[str, Any], task: str) -> Question:
    raw = record["choices"]
    labels: list[str] = list(_LETTERS)
    if isinstance(raw, dict) and "text" in raw:  # ARC on the hub: {"text": [..], "label": [..]}
        raw, labels = raw["text"], [str(label) for label in raw["label"]]
    elif isinstance(raw, dict):
        raw, labels = list(raw.values()), list(raw)
    choices = [str(choice) for choice in raw]
    answer = _answer_index(record.get("answer", record.get("answerKey")), choices, labels)
    task = str(record.get("task", task))
    if "context" in record:
        return Question(str(record["context"]), tuple(choices), answer, task)
    return asked(str(record["question"]), choices, answer, task)


def _answer_index(answer: Any, choices: list[str], labels: list[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    text = str(answer).strip()
    if text in choices:
        return choices.index(text)
    if text in labels:
        return labels.index(text)
    if text.isdigit():
        return int(text)
    raise ValueError(f"the answer {answer!r} is no index, label or choice")


def _instruction(record: dict[str, Any], task: str) -> Question:
    """Records whose choices stand inside the instruction, and whose answer is "solution2", "true" and the like."""
    text, answer = str(record["instruction"]), str(record["answer"]).strip().lower()
    if answer in ("true", "false"):
        match = _TRUE_FALSE.search(text)
        if match is None:
            raise ValueError("no true/false question")
        return asked(match[1].rstrip("?") + "?", ("no", "yes"), int(answer == "true"), task)
    body = text.rpartition("Answer format:")[0] or text
    head, *rest = _INLINE_CHOICE.split(body)
    choices = [choice.strip() for choice in rest[1::2]]
    index = int(re.sub(r"\D", "", answer)) - 1
    question = head.partition(":")[2].strip()
    if "fill in the blank" in head and "_" in question:
        before, _, after = question.partition("_")
        return Question(before.rstrip(), tuple(f" {choice}{after}" for choice in choices), index, task)
    return asked(question, choices, index, task)


# The key that gives a format away, most telling first.
_BY_KEY: dict[str, Callable[[dict[str, Any], str], Question]] = {
    "sentence_good": _blimp,
    "choices": _plain,
    "instruction": _instruction,
}


def _mmlu(text: str, task: str, path: Path) -> Iterator[Question]:
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if number == 1 and row and row[-1].strip().lower() == "answer":
            continue
        if len(row) < 4:
            raise BadData(
                f"row {number} has {len(row)} columns", file=path, hint="question, two or more choices, and the answer"
            )
        question, *choices, answer = (cell.strip() for cell in row)
        letters = _LETTERS[: len(choices)]
        if answer not in letters and not (answer.isdigit() and int(answer) < len(choices)):
            raise BadData(f"row {number} has the answer {answer!r}", file=path, hint=f"give 0.. or one of {letters}")
        index = int(answer) if answer.isdigit() else letters.index(answer)
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
        yield Question(f"{question}\n{listed}\nAnswer:", tuple(f" {letter}" for letter in letters), index, task)
