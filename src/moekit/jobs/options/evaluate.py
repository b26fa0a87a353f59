"""Options of `moekit.jobs.evaluate`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, ModelRef, PlanRef, QuestionsRef, ResultsRef, TextRef
from moekit.jobs.options.ranked import RankedOptions


class EvaluateOptions(RankedOptions):
    """Measure a model on held-out text and on questions, and compare it with a baseline measured on the same."""

    job: ClassVar[str] = "moekit.jobs.evaluate"
    needs_out: ClassVar[bool] = False
    command: ClassVar[CommandLine] = CommandLine(
        help="Measure perplexity per domain and multiple choice, and compare with a baseline, pair by pair.",
        writes="folder of the results",
        arguments=("model",),
        examples=(
            "moekit evaluate ./moe --data demo --split heldout --questions ./piqa/test.json --limit 200 -o ./before",
            "moekit evaluate ./routed --data demo --split heldout --baseline ./before -o ./after",
        ),
    )

    model: ModelRef = Field(description="model: folder or hub id")
    plan: PlanRef | None = Field(default=None, description="routing plan to route by; the checkpoint's own by default")
    name: str = Field(default="", description="what to call the model in tables; by default the folder's name")
    data: TextRef | None = Field(default=None, description="text for perplexity: file, folder, source, mix or hub id")
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
