"""The student: opened, trained, given back the type that it is stored in; its last good weights kept if that fails."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moekit._progress import Progress
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.precision import stored_form
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.stored import mark_stored, round_as_stored
from moekit.errors import BadConfig, NumericFault
from moekit.jobs.context import JobContext
from moekit.jobs.healing.lesson import Lesson
from moekit.jobs.healing.sources import Sources
from moekit.jobs.options.heal import HealOptions
from moekit.jobs.shared.adapters import adapter_scratch
from moekit.jobs.shared.inputs import open_model, save_changed
from moekit.training import TrainResult, last_complete_checkpoint, train
from moekit.training.freeze import refuse_untold
from moekit.training.healing import What, load_unfinished, without_noise
from moekit.training.layers import moe_layers
from moekit.training.learning import why_stuck
from moekit.training.part_specs import PartSpec
from moekit.training.resume import checkpoints
from moekit.training.teacher import Teacher


def open_student(checkpoint: Checkpoint, device: str, progress: Progress | None) -> PreTrainedModel:
    """A model whose weights may learn: fp32, whatever they are stored in."""
    model: PreTrainedModel = open_model(str(checkpoint.path), device=device, dtype="float32", progress=progress)[0]
    return model


def check_parts(sources: Sources, what: What, device: str, progress: Progress | None) -> None:
    """Refuse what could not learn, before the teacher is asked.

    Raises:
        UnsupportedModel: there are no routers or experts, or nothing tells which weights they are.
        BadConfig: no gradient of an output reaches the routers: names the first of them.
    """
    if what not in ("router", "experts"):
        return
    skeleton = empty_model(sources.student)
    refuse_untold(skeleton, [PartSpec(what)])
    if what == "experts":
        return
    # Where a token takes one expert, or a policy decides, the routers themselves have to be asked.
    record = sources.student.record
    if (record is not None and record.parts) or any(layer.geometry.top_k == 1 for layer in moe_layers(skeleton)):
        _check_routers(sources, device, progress)


def _check_routers(sources: Sources, device: str, progress: Progress | None) -> None:
    layers = moe_layers(open_student(sources.student, device, progress))
    routed = [layer for layer in layers if layer.router is not None]
    reasons = [why_stuck(layer) for layer in routed]
    if routed and all(reasons):
        raise BadConfig(
            f"no gradient reaches the routers: {reasons[0]}",
            layer=routed[0].index,
            hint="heal other weights: --what norms, lora or experts",
        )


@dataclass(frozen=True, eq=False)
class Healing:
    """One piece of work.

    Attributes:
        options: of the job.
        sources: both models.
        lesson: texts, and settings of the run.
        context: where it works.
        record: settings that the record of what is written keeps.
    """

    options: HealOptions
    sources: Sources
    lesson: Lesson
    context: JobContext
    record: dict[str, Any]

    def train(
        self, model: PreTrainedModel, teacher: Teacher | None, scratch: Path, adapter: Path | None = None
    ) -> TrainResult:
        """Let a model learn where it is, or go on where a killed run was."""
        rows, config = self.lesson.rows, self.lesson.config
        with without_noise(model):
            return train(
                model,
                None,
                rows,
                config,
                output=scratch,
                progress=self.context.progress,
                teacher=teacher,
                adapter=adapter,
            )

    def write(self, model: PreTrainedModel, scores: dict[str, Any], out: Path | None = None) -> None:
        """Write the student with its record; it takes its name once it has been checked."""
        save_changed(
            model,
            self.lesson.tokenizer,
            self.context if out is None else dataclasses.replace(self.context, out=out),
            parent=self.options.model,
            config=self.record,
            scores=scores,
            drop_unknown=self.options.drop_unknown,
        )


def learn(work: Healing, model: PreTrainedModel, teacher: Teacher | None) -> TrainResult:
    """Train the student.

    Args:
        work: what is to be done.
        model: the student, fp32.
        teacher: what it is held against.

    Raises:
        NumericFault: the loss became NaN: says where the last good weights are.
    """
    try:
        adapter = adapter_scratch(work.options.keep_adapter, work.context)
        return work.train(model, teacher, work.context.scratch, adapter)
    except NumericFault as fault:
        raise NumericFault(
            f"{fault.message}; {_keep_last_good(work, model)}",
            layer=fault.layer,
            hint=f"heal again with a lower rate than --lr {work.lesson.config.lr:g}",
        ) from fault


def train_control(work: Healing, teacher: Teacher | None) -> PreTrainedModel:
    """The parent, trained on the same steps as its student was."""
    model = open_student(work.sources.teacher, work.options.device, work.context.progress)
    work.train(model, teacher, work.context.scratch / "control")
    return model


def as_stored(model: PreTrainedModel, source: Checkpoint) -> None:
    """Give a trained model the values that it has once it is written in the type of its source, and mark it so."""
    mark_stored(model, stored_form(source))
    round_as_stored(model)


def _keep_last_good(work: Healing, model: PreTrainedModel) -> str:
    """Write what was learnt up to the last checkpoint as a model of its own; says what was done."""
    checkpoint = last_complete_checkpoint(work.context.scratch)
    if checkpoint is None:
        return "there was no checkpoint before, so nothing was learnt"
    step = int(checkpoint.name.rpartition("-")[2])
    out = work.context.out.with_name(f"{work.context.out.name}-step-{step}")
    if out.exists():
        return f"{out} is there already, so the weights of step {step} were not kept"
    load_unfinished(model, work.lesson.config, checkpoint)
    as_stored(model, work.sources.student)
    work.write(model, {"unfinished": step}, out)
    for _, folder in checkpoints(work.context.scratch):
        shutil.rmtree(folder)  # the same call again would go on with them, to the same end
    return f"the weights of step {step} are kept in {out}"
