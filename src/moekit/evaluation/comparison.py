"""One model against another: what b costs or gains over a, with error bars, per domain and per task."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from moekit.errors import BadData
from moekit.evaluation.documents import DomainPerplexity, PerplexityResult
from moekit.evaluation.pairs import McNemar, PairedDifference, check_same_text, mcnemar, paired
from moekit.evaluation.questions import TaskResult

# Which of lm-eval's metrics a comparison shows: the length-normalised one where the task has it.
PREFERRED = ("acc_norm", "acc", "exact_match")


class Evaluation(BaseModel):
    """All that was measured of one model.

    Attributes:
        name: what to call it, such as "C2R T=4".
        perplexity: on text, if measured.
        tasks: multiple choice, if measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    perplexity: PerplexityResult | None = None
    tasks: tuple[TaskResult, ...] = ()


class DomainComparison(BaseModel):
    """Two models on the documents of one domain.

    Attributes:
        domain: its name; "all" for all of them.
        a: the baseline.
        b: the other one.
        difference: b - a, nats per token; its `ratio` is perplexity b / perplexity a. None with one document.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    a: DomainPerplexity
    b: DomainPerplexity
    difference: PairedDifference | None


class TaskComparison(BaseModel):
    """Two models on the questions of one task.

    Attributes:
        task: its name.
        metric: which metric of lm-eval.
        n: questions.
        a: the baseline's value.
        a_error: its standard error.
        b: the other one's value.
        b_error: its standard error.
        difference: b - a, question by question. None with one question.
        test: McNemar's, for right-or-wrong metrics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    n: int
    a: float
    a_error: float | None
    b: float
    b_error: float | None
    difference: PairedDifference | None
    test: McNemar | None


class Comparison(BaseModel):
    """Model b against model a.

    Attributes:
        a: name of the baseline.
        b: name of the other one.
        overall: all text together.
        domains: each domain.
        tasks: each task both were measured on.
        tasks_mean: paired difference over all questions, each task weighing the same. None without tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: str
    b: str
    overall: DomainComparison | None
    domains: tuple[DomainComparison, ...]
    tasks: tuple[TaskComparison, ...]
    tasks_mean: PairedDifference | None


def compare(a: Evaluation, b: Evaluation, seed: int = 0) -> Comparison:
    """Compare two models measured on the same text and questions.

    Args:
        a: the baseline.
        b: what is compared with it.
        seed: of the bootstraps and sign flips.

    Raises:
        BadData: nothing in common, or different questions.
        BadConfig: measured on different text.
    """
    overall: DomainComparison | None = None
    domains: list[DomainComparison] = []
    if a.perplexity is not None and b.perplexity is not None:
        check_same_text(a.perplexity, b.perplexity)
        overall = _text(a.perplexity, b.perplexity, "all", range(len(a.perplexity.domains)), seed)
        domains = [
            _text(a.perplexity, b.perplexity, name, chosen, seed)
            for name, chosen in a.perplexity.indices().items()
            if any(a.perplexity.tokens[i] for i in chosen)
        ]
    of_b = {task.task: task for task in b.tasks}
    pairs = [(task, of_b[task.task]) for task in a.tasks if task.task in of_b]
    if overall is None and not pairs:
        raise BadData(
            f"{a.name} and {b.name} were not measured on anything in common",
            hint="evaluate both on the same text or tasks",
        )
    tasks = [_task(x, y, seed) for x, y in pairs]
    return Comparison(
        a=a.name,
        b=b.name,
        overall=overall,
        domains=tuple(domains),
        tasks=tuple(tasks),
        tasks_mean=_tasks_mean(pairs, [task.metric for task in tasks], seed),
    )


def _text(a: PerplexityResult, b: PerplexityResult, name: str, chosen: Sequence[int], seed: int) -> DomainComparison:
    some_a, some_b = (
        r.only(chosen).model_copy(update={"domains": tuple(name for _ in chosen), "model": ""}) for r in (a, b)
    )
    [of_a], [of_b] = some_a.per_domain(), some_b.per_domain()
    difference = paired(some_a, some_b, seed) if of_a.documents > 1 else None
    return DomainComparison(domain=name, a=of_a, b=of_b, difference=difference)


def _task(a: TaskResult, b: TaskResult, seed: int) -> TaskComparison:
    if a.questions != b.questions:
        raise BadData(
            f"the two models answered different questions of {a.task}: {a.n} and {b.n}",
            hint="evaluate both with the same questions and limit",
        )
    metric = next((m for m in (*PREFERRED, *a.metrics) if m in a.metrics and m in b.metrics), None)
    if metric is None:
        raise BadData(f"no metric of {a.task} is stated question by question, so nothing can be paired")
    of_a, of_b = a.metrics[metric], b.metrics[metric]
    binary = set(of_a.answers) | set(of_b.answers) <= {0.0, 1.0}
    return TaskComparison(
        task=a.task,
        metric=metric,
        n=a.n,
        a=of_a.value,
        a_error=of_a.standard_error,
        b=of_b.value,
        b_error=of_b.standard_error,
        difference=paired(of_a.answers, of_b.answers, seed) if a.n > 1 else None,
        test=mcnemar(of_a.answers, of_b.answers) if binary else None,
    )


def _tasks_mean(
    pairs: Sequence[tuple[TaskResult, TaskResult]], metrics: Sequence[str], seed: int
) -> PairedDifference | None:
    a = [answer for (x, _), m in zip(pairs, metrics, strict=True) for answer in x.metrics[m].answers]
    b = [answer for (_, y), m in zip(pairs, metrics, strict=True) for answer in y.metrics[m].answers]
    weights = [1 / x.n for x, _ in pairs for _ in range(x.n)]
    return paired(a, b, seed, weights=weights) if len(a) > 1 else None
