"""Multiple choice through lm-eval: its prompts, its metrics, its numbers, on our questions or on its own tasks.

The log likelihoods that lm-eval asks for are computed here, with logits only where an answer's tokens are; requests
that read the same tokens and differ in the last one only (answers of one token) share a forward.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from moekit._names import hint_for
from moekit._progress import Progress
from moekit.data.forcing import refuse_reader
from moekit.errors import BadConfig, BadData, UnsafeInput
from moekit.evaluation.likelihood import evaluating


class QuestionLike(Protocol):
    """What is read of a question: `moekit.data.Question` is one."""

    @property
    def context(self) -> str:
        """Text before the answer; may be empty."""

    @property
    def choices(self) -> Sequence[str]:
        """The possible answers, used as they are: mostly with a space at the front."""

    @property
    def answer(self) -> int:
        """Index of the right one."""

    @property
    def task(self) -> str:
        """Name of the task it belongs to."""


class Metric(BaseModel):
    """One of lm-eval's metrics.

    Attributes:
        value: over all questions.
        standard_error: as lm-eval states it; None where it states none.
        answers: the metric of each question, in order (0 or 1 for accuracies).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    standard_error: float | None
    answers: tuple[float, ...]


class TaskResult(BaseModel):
    """What lm-eval says of one task.

    Attributes:
        task: its name.
        n: number of questions.
        metrics: by lm-eval's name, such as "acc" and "acc_norm".
        questions: hash of the prompts and targets; equal hashes may be compared question by question.
        model: what was measured, for people.
        lm_eval: version of lm-eval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    n: int
    metrics: dict[str, Metric]
    questions: str
    model: str = ""
    lm_eval: str = ""


def choices(
    model: Any,
    tokenizer: Any,
    questions: Iterable[QuestionLike] = (),
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch_tokens: int | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> tuple[TaskResult, ...]:
    """Let lm-eval measure a model, zero-shot on local questions and as registered on named tasks.

    Args:
        model: causal language model of transformers; its mode is restored afterwards.
        tokenizer: its tokenizer; not changed.
        questions: local multiple-choice questions, of any number of tasks.
        tasks: names from lm-eval's registry, such as "piqa"; their data come from the hub.
        limit: at most this many questions of each task.
        batch_tokens: rows times longest row of one forward; by default 2,048 on CPU and 16,384 elsewhere.
        name: what to call the model in tables.
        progress: told of each request.

    Returns:
        One result per task, local ones first.

    Raises:
        BadConfig: lm-eval is not installed, or has no such task.
        BadData: no questions, or damaged ones.
        UnsafeInput: a task that runs generated code.
        NumericFault: NaN likelihoods.
        UnsupportedModel: an encoder with a decoder, which would read the answer before it writes it.
    """
    refuse_reader(getattr(model, "config", None), "questions cannot be asked")
    _require()
    from moekit.evaluation import _lm_eval

    local = _by_task(questions, limit)
    if not local and not tasks:
        raise BadData("there are no questions", hint="give questions, or names of lm-eval tasks")
    built = {task: _lm_eval.LocalTask(task, some) for task, some in local.items()}
    built |= _named(tasks, taken=set(built))
    with evaluating(model):
        lm = _lm_eval.ScorerLM(model, copy.deepcopy(tokenizer), batch_tokens=batch_tokens, progress=progress)
        raw = _lm_eval.evaluate(lm, built, limit)
    return tuple(_result(task, raw, name) for task in built)


def check_choices(questions: Iterable[QuestionLike], tasks: Sequence[str] = ()) -> None:
    """Refuse what `choices` would refuse, before a model is opened; no task's data are fetched.

    Args:
        questions: as `choices` takes them.
        tasks: names from lm-eval's registry.

    Raises:
        BadConfig: lm-eval is not installed, or has no such task.
        BadData: no questions, or damaged ones.
    """
    _require()
    if not _by_task(questions, None) and not tasks:
        raise BadData("there are no questions", hint="give questions, or names of lm-eval tasks")
    if tasks:
        _known(tasks)


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise BadConfig("multiple choice needs lm-eval", hint='pip install "moekit[eval]"') from error


def _by_task(questions: Iterable[QuestionLike], limit: int | None) -> dict[str, list[QuestionLike]]:
    found: dict[str, list[QuestionLike]] = {}
    for number, question in enumerate(questions):
        where = f"question {number} of {question.task!r}"
        if len(question.choices) < 2:
            raise BadData(f"{where} has {len(question.choices)} choices", hint="a question needs at least two")
        if not 0 <= question.answer < len(question.choices):
            raise BadData(f"{where} has {len(question.choices)} choices, but its answer is number {question.answer}")
        if not all(choice.strip() for choice in question.choices):
            raise BadData(f"{where} has an empty choice")
        some = found.setdefault(question.task, [])
        if limit is None or len(some) < limit:
            some.append(question)
    return found


def _named(names: Sequence[str], taken: set[str]) -> dict[str, Any]:
    """Build lm-eval's own tasks; only registered names, since a path to a task file could run code."""
    if not names:
        return {}
    from moekit.evaluation import _lm_eval

    built = _lm_eval.registered(_known(names), names)
    for name, task in built.items():
        if name in taken:
            raise BadConfig(f"two tasks are called {name!r}", hint="rename the local questions' task")
        if getattr(task, "UNSAFE_CODE", False):
            raise UnsafeInput(f"the task {name!r} runs code that the model writes", hint="run it with lm-eval itself")
    return built


def _known(names: Sequence[str]) -> Any:
    """lm-eval's registry, which holds all of these.

    Raises:
        BadConfig: it does not.
    """
    from moekit.evaluation import _lm_eval

    manager = _lm_eval.manager()
    for name in names:
        if name not in manager.all_tasks:
            hint = hint_for(name, manager.all_tasks, otherwise="see `lm-eval ls tasks`")
            raise BadConfig(f"lm-eval has no task {name!r}", hint=hint)
    return manager


def _result(task: str, raw: dict[str, Any], name: str) -> TaskResult:
    samples = sorted(raw["samples"][task], key=lambda sample: int(sample["doc_id"]))
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    kept = [sample for sample in samples if sample["filter"] == filters[0]]
    stated = raw["results"][task]
    metrics: dict[str, Metric] = {}
    for metric in kept[0]["metrics"]:
        answers = [sample[metric] for sample in kept]
        # Metrics that need all questions at once (F1, perplexity) give tuples per question and can't be paired.
        if not all(isinstance(answer, int | float) for answer in answers):
            continue
        error = stated.get(f"{metric}_stderr,{filters[0]}")
        metrics[metric] = Metric(
            value=float(stated[f"{metric},{filters[0]}"]),
            standard_error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
            answers=tuple(float(answer) for answer in answers),
        )
    asked = json.dumps([[sample["prompt_hash"], sample["target_hash"], sample["doc_hash"]] for sample in kept])
    import lm_eval

    return TaskResult(
        task=task,
        n=len(kept),
        metrics=metrics,
        questions=hashlib.sha256(asked.encode()).hexdigest(),
        model=name,
        lm_eval=str(lm_eval.__version__),
    )
