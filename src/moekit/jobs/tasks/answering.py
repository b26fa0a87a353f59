"""Answering prompts with the experts of their task alone: which task each belongs to, one task after the other."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit import catalogue
from moekit._device import named_dtype
from moekit._progress import Progress
from moekit.compress.engine.layout import OutputLayout
from moekit.data.encoding import encode
from moekit.errors import BadConfig, BadData
from moekit.evaluation import complete
from moekit.evaluation.generation import Completion
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.tasks import TaskOptions
from moekit.jobs.shared.inputs import model_item
from moekit.jobs.shared.opened import OpenedModel, check_runnable, open_source
from moekit.jobs.weights.protection import SUPER, parse_protected
from moekit.jobs.weights.sizes import budget_of
from moekit.serving.expert_sets.expert_set import GENERALIST, ExpertSet
from moekit.serving.expert_sets.loading import load_task, plan_task
from moekit.serving.expert_sets.retrieval import queries_from_disk, retrieve
from moekit.serving.expert_sets.store import ExpertSetStore


def check_tasks(options: TaskOptions) -> None:
    """Refuse what cannot work before anything is read.

    Raises:
        BadConfig: options of expert sets without expert sets, no budget, or an impossible one.
    """
    given = sorted(options.given(*(name for name in TaskOptions.model_fields if name != "expert_sets")))
    if options.expert_sets is None:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise BadConfig(f"{names}: about a task's experts", hint="give the folder of expert sets (--expert-sets)")
        return
    if options.keep is None:
        raise BadConfig("nothing says how many experts to load", hint="--keep 64, --keep 0.5 or --keep 12GiB")
    budget_of(options.keep, "uniform", None, None)
    if options.protect == SUPER:
        raise BadConfig("super experts are found on text, and there is none here", hint="name them, such as 1:68")


@dataclass(frozen=True)
class Assigned:
    """Which task a prompt belongs to.

    Attributes:
        prompt: the text.
        task: whose experts answer it.
        metric: of the distances.
        nearest: tasks with their distances, nearest first; empty where the task was named.
    """

    prompt: str
    task: str
    metric: str = ""
    nearest: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        if not self.nearest:
            return self.task
        first, second = self.nearest[0], self.nearest[1:2]
        far = f"{self.metric} distance {first[1]:.4g}" + (f" from {first[0]}" if first[0] != self.task else "")
        return f"{self.task} ({far}; {f'next {second[0][0]}, {second[0][1]:.4g}' if second else 'the only task'})"


@dataclass(frozen=True)
class Answered:
    """A prompt, its task, and how the task's experts continue it."""

    assigned: Assigned
    completion: Completion

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        nearest = [{"task": task, "distance": distance} for task, distance in self.assigned.nearest]
        about = {"task": self.assigned.task, "metric": self.assigned.metric or None, "nearest": nearest}
        return {**self.completion.model_dump(mode="json"), **about}


class TaskModels:
    """A model on disk and the expert sets of its tasks.

    Args:
        options: with `expert_sets`.
        reference: of the model.
        device: where layers run and models go.
        dtype: of the weights in memory.
        progress: told of downloads, layers and bytes.

    Raises:
        BadData: no expert sets, or of another model; no such task.
        BadConfig: a budget that this model cannot have, or experts to protect that are not there.
    """

    def __init__(
        self, options: TaskOptions, reference: str, *, device: str, dtype: str, progress: Progress | None = None
    ) -> None:
        check_tasks(options)
        self.options = options
        self.reference = reference
        self.source: OpenedModel = open_source(reference, progress)
        fingerprint = "" if options.other_weights else self.source.checkpoint.fingerprint
        self.store: ExpertSetStore = ExpertSetStore(str(options.expert_sets), fingerprint)
        self.expert_sets: dict[str, ExpertSet] = self.store.load_all()
        if not self.expert_sets:
            raise BadData(
                "the folder holds no expert sets", file=self.store.folder, hint="moekit expert-sets makes them"
            )
        if options.task is not None:
            self.store.load(options.task)
        self._device, self._dtype, self._progress = device, dtype, progress
        self._protected = None if options.protect is None else parse_protected(options.protect, self.source)
        # The budget is refused now, whatever task is retrieved: all are of one shape.
        self.plan(options.task or next(iter(self.expert_sets)))

    def plan(self, task: str) -> OutputLayout:
        """What would be read for a task."""
        return plan_task(self.source.checkpoint, self.expert_sets[task], self._budget, **self._choice)

    @property
    def _budget(self) -> Any:
        return budget_of(self.options.keep, "uniform", None, None)

    @property
    def _choice(self) -> dict[str, Any]:
        options = self.options
        return {"protected": self._protected, "top_k": options.top_k, "other_weights": options.other_weights}

    def assign(self, prompts: Sequence[str]) -> list[Assigned]:
        """Say which task each prompt belongs to: the one named, or the nearest.

        For that no more of the model is read than its first layers. A prompt is read as the tasks' text was: without
        special tokens and chat template.

        Raises:
            BadData: an empty prompt, nothing to compare with, or a prompt far from all tasks and no generalist.
            BadConfig: more layers than there are.
            UnsupportedModel: the weights are quantized in a way that is not read here.
        """
        if self.options.task is not None:
            return [Assigned(prompt, self.options.task) for prompt in prompts]
        fallback = GENERALIST if GENERALIST in self.expert_sets else None
        metric = self.options.metric or ("l2" if self._origin.method == "premoe" else "cosine")
        assigned = []
        for prompt, scores in zip(prompts, self._scores(prompts), strict=True):
            limit = self.options.max_distance
            found = retrieve(self.expert_sets, scores, metric=metric, limit=limit, fallback=fallback)
            if found.task is None:
                raise BadData(
                    f"{prompt[:40]!r} is of no task: {found.distance:.4g} from {found.ranked[0][0]}, the nearest",
                    file=self.store.folder,
                    hint="name the task (--task), allow more (--max-distance), or store a generalist "
                    "(moekit expert-sets --generalist)",
                )
            assigned.append(Assigned(prompt, found.task, metric, found.ranked))
        return assigned

    @property
    def _origin(self) -> Any:
        return next(iter(self.expert_sets.values())).origin

    def _scores(self, prompts: Sequence[str]) -> list[Any]:
        check_runnable(self.source, hint="name the task (--task)")
        tokenizer = self.source.tokenizer()
        read = [encode(prompt, tokenizer) for prompt in prompts]
        if not all(read):
            raise BadData("a prompt is empty: no task can be told from it", hint="give at least one word")
        return queries_from_disk(
            self.source.checkpoint,
            [ids[: self.source.longest] for ids in read],
            method=catalogue.make("prune", self._origin.method, self._origin.knobs),
            layers=self.options.retrieval_layers,
            dtype=named_dtype(self._dtype),
            device=self._device,
            progress=self._progress,
        )

    def complete(self, assigned: Sequence[Assigned], tokens: int) -> list[Answered]:
        """Continue prompts, task by task: each task's experts are loaded once, and gone before the next ones come.

        Args:
            assigned: what `assign` gave.
            tokens: longest continuation.
        """
        tokenizer = self.source.tokenizer()
        done: dict[int, Answered] = {}
        for task in dict.fromkeys(item.task for item in assigned):
            numbers = [number for number, item in enumerate(assigned) if item.task == task]
            model = load_task(
                self.source.checkpoint,
                self.expert_sets[task],
                self._budget,
                device=self._device,
                dtype=self._dtype,
                progress=self._progress,
                **self._choice,
            )
            texts = [assigned[number].prompt for number in numbers]
            made = complete(model, tokenizer, texts, max_new_tokens=tokens, name=task, progress=self._progress)
            done |= {n: Answered(assigned[n], c) for n, c in zip(numbers, made.completions, strict=True)}
            del model
            gc.collect()
        return [done[number] for number in range(len(assigned))]

    def estimate(self) -> JobEstimate:
        """Exact: how many bytes are read does not depend on which experts stay."""
        work = self.plan(self.options.task or next(iter(self.expert_sets)))
        nbytes = read_bytes(work)
        layers = "" if self.options.task else f"; before it layers up to MoE layer {self.options.retrieval_layers}"
        reads = (Item(f"{self.reference}, the experts of one task", nbytes), ByteSizes().item(self.store.folder))
        notes = (f"of {model_item(self.reference, ByteSizes()).nbytes or 0:,} bytes that the model has{layers}",)
        return JobEstimate(reads, (), disk=0, memory=nbytes + (1 << 28), notes=notes)


def read_bytes(work: OutputLayout) -> int:
    """Bytes of all tensors of a task's model."""
    return sum(kept.spec.nbytes for kept in work.kept)


def summary(models: TaskModels, answered: Sequence[Answered]) -> Mapping[str, Any]:
    """All of it, as JSON holds it."""
    tasks = dict.fromkeys(item.assigned.task for item in answered)
    works = {task: models.plan(task) for task in tasks}
    loaded = {
        task: {
            "experts": {str(n): list(d.keep) for n, d in work.outcomes.items()},
            "of": max(work.counts.values()),
            "bytes": read_bytes(work),
        }
        for task, work in works.items()
    }
    told = {"model": models.reference, "model_bytes": models.source.nbytes, "expert_sets": str(models.store.folder)}
    return {**told, "loaded": loaded, "completions": [item.as_dict() for item in answered]}
