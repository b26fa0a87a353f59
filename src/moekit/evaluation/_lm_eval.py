"""The part of `choices` that needs lm-eval to be imported."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moekit._progress import Progress
from moekit.data import vocabulary
from moekit.evaluation.likelihood import Scorer
from moekit.evaluation.windows import Window, by_length

# What lm-eval's own command line uses.
FEWSHOT_SEED = 1234


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold back a logger's warnings; lm-eval warns of every model that is handed over already loaded."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """An lm-eval task over questions at hand; nothing is downloaded."""

    def __init__(self, name: str, questions: Sequence[Any]) -> None:
        choices = [list(q.choices) for q in questions]
        # lm-eval counts an answer's length, for acc_norm, without the space before it: hand it over as lm-eval's own
        # tasks do, apart. Where answers begin otherwise they are used as they are.
        spaced = all(c.startswith(" ") and not c[1:2].isspace() for some in choices for c in some)
        choices = [[c[1:] for c in some] for some in choices] if spaced else choices
        self._rows = [
            {"context": q.context, "choices": some, "answer": int(q.answer)}
            for q, some in zip(questions, choices, strict=True)
        ]
        # Functions, not strings: lm-eval would read a string as a template or as a column's name.
        super().__init__(
            config={
                "task": name,
                "dataset_path": "local",
                "test_split": "test",
                "output_type": "multiple_choice",
                "target_delimiter": " " if spaced else "",
                "doc_to_text": lambda doc: doc["context"],
                "doc_to_choice": lambda doc: doc["choices"],
                "doc_to_target": lambda doc: doc["answer"],
                "num_fewshot": 0,
                "metric_list": [
                    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                    {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
                ],
                "metadata": {"version": 1.0},
            }
        )

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Take the questions given."""
        self.dataset = DatasetDict({"test": Dataset.from_list(self._rows)})

    def build_all_requests(self, *, limit: int | None = None, rank: int = 0, world_size: int = 1, **_: Any) -> None:
        """Make lm-eval's requests, without its progress bar."""
        self._instances = [
            instance
            for number, doc in self.doc_iterator(rank=rank, limit=limit, world_size=world_size)
            for instance in self.construct_requests(
                doc=doc,
                ctx=self.fewshot_context(doc, num_fewshot=0),
                metadata=(self.config.task, number, self.config.repeats),
            )
        ]


class ScorerLM(HFLM):  # type: ignore[misc]
    """lm-eval's model wrapper with its likelihoods computed by `Scorer`."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int | None, progress: Progress | None) -> None:
        with _quiet(HFLM.__module__):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
        self._scorer = Scorer(model)
        on_cpu = self._scorer.device.type == "cpu"
        self._batch_tokens = batch_tokens or (2048 if on_cpu else 16384)
        self._progress = progress

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Score requests, without lm-eval's progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        windows, members = _share([(context, answer) for _, context, answer in requests], self.max_length)
        vocabulary.check(
            max(max(max(w.inputs), max(w.targets)) for w in windows), vocabulary.embedding_rows(self.model)
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        if self._progress is not None:
            self._progress.start("answering", len(requests))
        try:
            for group in by_length(windows, self._batch_tokens):
                for window, (nll_M, greedy_M) in zip(group, self._scorer(group), strict=True):
                    who = members[window.document]
                    common = len(window.targets) - len(who)
                    base, all_greedy = float(nll_M[:common].sum()), bool(greedy_M[:common].all())
                    for i, request in enumerate(who, start=common):
                        answers[request] = (-(base + float(nll_M[i])), all_greedy and bool(greedy_M[i]))
                if self._progress is not None:
                    self._progress.advance(sum(len(members[w.document]) for w in group))
        finally:
            if self._progress is not None:
                self._progress.finish()
        return answers


def _share(pairs: Sequence[tuple[list[int], list[int]]], max_length: int) -> tuple[list[Window], list[list[int]]]:
    """Let requests that differ in their last token only share a window.

    Returns:
        The windows, whose `document` counts them, and which requests each one answers: its last targets, one apiece.
    """
    groups: dict[tuple[tuple[int, ...], int], list[tuple[int, int]]] = {}
    for number, (context, answer) in enumerate(pairs):
        ids = (context + answer)[-(max_length + 1) :]
        groups.setdefault((tuple(ids[:-1]), len(answer)), []).append((number, ids[-1]))
    windows: list[Window] = []
    members: list[list[int]] = []
    for (inputs, length), last in groups.items():
        first = len(inputs) - length + 1
        positions = [*range(first - 1, len(inputs) - 1), *[len(inputs) - 1] * len(last)]
        targets = [*inputs[first:], *(token for _, token in last)]
        windows.append(Window(inputs, positions, targets, len(members)))
        members.append([number for number, _ in last])
    return windows, members


def manager() -> Any:
    """lm-eval's registry of tasks (takes seconds to read)."""
    return TaskManager()


def registered(task_manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Build registered tasks; groups and tags become their members."""
    if hasattr(task_manager, "load"):
        return dict(task_manager.load(list(names))["tasks"])
    return _flat(task_manager.load_task_or_group(list(names)))


def _flat(nested: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            found |= _flat(value)
        else:
            found[str(key)] = value
    return found


def evaluate(lm: ScorerLM, tasks: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Run lm-eval's evaluator on built tasks."""
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return dict(evaluator.evaluate(lm, dict(tasks), limit=limit, bootstrap_iters=1000, log_samples=True))
