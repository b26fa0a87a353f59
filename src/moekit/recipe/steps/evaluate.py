"""`use: evaluate`: perplexity per domain and multiple choice, compared with a baseline pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, PlanRef, QuestionsRef, ResultsRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import is_first_rank, model_item, open_model, read_text, text_item
from moekit.jobs.shared.ranked import RankedOptions, deal_out, ranks_of
from moekit.recipe.steps.base import Step
from moekit.report.results import COMPARISON, EVALUATION, load_evaluation

if TYPE_CHECKING:
    from moekit.parallel.launch.start import StartedRanks


class EvaluateStep(RankedOptions, Step):
    """Measure a model on held-out text and on questions, and compare it with a baseline measured on the same."""

    use: Literal["evaluate"] = "evaluate"
    model: ModelRef = Field(description="model: folder or hub id")
    plan: PlanRef | None = Field(default=None, description="routing plan to route by; the checkpoint's own by default")
    name: str = Field(default="", description="what to call the model in tables; by default the folder's name")
    text: TextRef | None = Field(default=None, description="text for perplexity: file, folder, source, mix or hub id")
    split: Literal["train", "heldout"] | None = Field(default=None, description="part of the text to take")
    max_tokens: int | None = Field(default=None, ge=2, description="tokens, at most, shared among the documents")
    window: int | None = Field(
        default=None, ge=2, description="longest context in tokens (default: the model's, ≤ 1024)"
    )
    questions: tuple[QuestionsRef, ...] = Field(default=(), description="files, folders or sources of multiple choice")
    tasks: tuple[str, ...] = Field(default=(), description="tasks of lm-eval's registry, fetched from the hub")
    limit: int | None = Field(default=None, ge=1, description="questions of each task, at most")
    baseline: ResultsRef | None = Field(default=None, description="evaluation to compare with")
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    def check(self) -> None:
        """Refuse impossible ranks."""
        self.check_ranks()

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Results are small; the model is in memory once."""
        model = model_item(self.model, sizes)
        reads = [model, *(text_item(item, sizes) for item in (self.text, *self.questions) if item)]
        return Forecast(tuple(reads), (Item(str(out), 1 << 20),), disk=1 << 20, memory=model.nbytes)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Measure, compare and write."""
        self.check_ranks()
        if self.text is None and not self.questions and not self.tasks:
            raise BadConfig("there is nothing to measure", hint="give text, questions or tasks")
        with ranks_of(self) as started:
            return self._measure(work, started)

    def _measure(self, work: JobContext, started: StartedRanks | None) -> dict[str, Any]:
        from moekit.checkpoint import atomic_folder
        from moekit.evaluation import Evaluation, choices, compare

        name = self.name or Path(self.model).name
        model, tokenizer = open_model(
            self.model, plan=self.plan, device=self.device, dtype=self.dtype, progress=work.progress
        )
        if started is not None:
            # All ranks measure the same and deal the tokens of each batch out between them; the first one writes.
            asked = self.model_dump(mode="json", exclude={"placement", "device"})
            deal_out(model, self, started, shared_batch=True, facts={**asked, "seed": work.seed})
        perplexity = self._perplexity(model, tokenizer, name, work) if self.text is not None else None
        tasks = ()
        if self.questions or self.tasks:
            tasks = choices(
                model,
                tokenizer,
                self._questions(work),
                tasks=self.tasks,
                limit=self.limit,
                name=name,
                progress=work.progress,
            )
        evaluation = Evaluation(name=name, perplexity=perplexity, tasks=tasks)
        comparison = None
        if self.baseline is not None:
            comparison = compare(load_evaluation(self.baseline), evaluation, seed=work.seed)
        if not is_first_rank():
            return _figures(evaluation, comparison)
        with atomic_folder(work.out, overwrite=work.overwrite) as folder:
            (folder / EVALUATION).write_text(evaluation.model_dump_json(indent=1) + "\n")
            if comparison is not None:
                (folder / COMPARISON).write_text(comparison.model_dump_json(indent=1) + "\n")
        return _figures(evaluation, comparison)

    def _perplexity(self, model: Any, tokenizer: Any, name: str, work: JobContext) -> Any:
        from moekit.data import tokenize
        from moekit.data.passages import units
        from moekit.evaluation import perplexity_of_documents

        assert self.text is not None
        documents = units(read_text(self.text, split=self.split, seed=work.seed, progress=work.progress))
        each = None if self.max_tokens is None else max(2, self.max_tokens // len(documents))
        tokenized = tokenize(documents, tokenizer, each, bos=self.bos)
        return perplexity_of_documents(model, tokenized, window=self.window, name=name, progress=work.progress)

    def _questions(self, work: JobContext) -> list[Any]:
        from moekit.data import load_questions

        found: list[Any] = []
        for reference in self.questions:
            found += load_questions(reference, limit=self.limit, seed=work.seed, progress=work.progress)
        return found


def _figures(evaluation: Any, comparison: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": evaluation.name, "domains": [], "tasks": []}
    if evaluation.perplexity is not None:
        whole = (evaluation.perplexity.overall, *evaluation.perplexity.per_domain())
        figures["domains"] = [domain.model_dump() for domain in whole]
    for task in evaluation.tasks:
        values = {name: [metric.value, metric.standard_error] for name, metric in task.metrics.items()}
        figures["tasks"].append({"task": task.task, "n": task.n, "metrics": values})
    if comparison is not None:
        figures["comparison"] = comparison.model_dump(mode="json")
    return figures
