"""One training run between its preparation and its result: freezing, the loop, checkpoints, what is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from moekit._files import read_text
from moekit._progress import Progress
from moekit._ranks import is_first_rank
from moekit.checkpoint.atomic import atomic_write
from moekit.data.batches import TokenBatches
from moekit.errors import BadConfig
from moekit.training.callback import MoECallback
from moekit.training.chooser import check_routers_told
from moekit.training.compute import (
    attention_for,
    checkpointed_activations,
    experts_for,
    frozen_weights_in,
    resolve_precision,
)
from moekit.training.config import TrainConfig, TrainResult
from moekit.training.distribution import Distribution
from moekit.training.freeze import FreezeReport, train_only
from moekit.training.identity import RESULT_FILE
from moekit.training.knobs import Knobs, ScheduleCallback
from moekit.training.learning import check_routers_learn
from moekit.training.lora import add_lora, merge_lora, save_adapter
from moekit.training.order import OrderedRows
from moekit.training.own_loss import computes_loss, readable_head
from moekit.training.residual_rows import residual_rows
from moekit.training.resume import (
    RANKS,
    STATE_FILE,
    CompleteCheckpoints,
    checkpoints,
    last_complete_checkpoint,
    load_changing,
    save_changing,
)
from moekit.training.rows import ExpertRows
from moekit.training.teacher import Teacher
from moekit.training.terms import Terms
from moekit.training.texts import Texts
from moekit.training.trainer import RunTrainer, training_arguments

if TYPE_CHECKING:
    from peft import PeftModel

# By so many figures of its routing a run is divided.
WINDOWS = 20
_OWN_LOSS = "config.json wants router logits (output_router_logits): the family's own auxiliary loss, if there is one, "
_KEPT, _LEFT_OUT = "is part of the cross-entropy", "is left out, as the installed transformers cannot compute it here"


def _check_types(model: nn.Module) -> None:
    """Refuse weights that train in a type in which small steps vanish; frozen ones may be kept in any."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            raise BadConfig(
                f"{name!r} trains, but is kept in {parameter.dtype}: small steps would be lost in rounding",
                hint="load it with dtype=float32; precision=bf16 then computes in bf16 over fp32 weights",
            )


class Session:
    """One run on one model.

    Args:
        model: to be trained in place.
        config: the run's knobs.
        terms: of the loss.
        texts: by name, with the order of their rows.
        distribution: how the model lies on ranks, if they share it.
        teacher: what the objective `kd` holds the output against.
        adapter: folder for the adapter as it is before it is merged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        terms: Terms,
        texts: Texts,
        distribution: Distribution | None,
        teacher: Teacher | None,
        adapter: Path | None = None,
    ) -> None:
        self.base, self.config, self.terms, self.texts, self.steps = model, config, terms, texts, texts.steps
        self.distribution, self.teacher, self.adapter = distribution, teacher, adapter
        self.rows_kept: ExpertRows | None = None
        # Off by now, unless only the family can compute it (`moekit.training.run`).
        self._own_loss = bool(getattr(model.config.get_text_config(), "output_router_logits", False))
        self._notes: list[str] = []
        self.precision = resolve_precision(config.precision, model.device)
        self.model: PreTrainedModel | PeftModel = model
        self.report = FreezeReport(trained={}, frozen={})

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Freeze, or put adapters on; at the end they are merged, after a failure taken off."""
        check_routers_told(self.base, self.config.router_lr)
        set_seed(self.config.seed)  # before adapters are drawn
        if self.config.lora is None:
            self.report = train_only(self.model, self.config.parts)
            _check_types(self.model)
            if self.distribution is None:  # parameters dealt out to ranks do not answer alone
                check_routers_learn(self.model, self.config)
            with self._still_rows():
                yield
            return
        wrapped = self.model = add_lora(self.base, self.config.lora)
        try:
            self.report = train_only(wrapped, ("adapters",))
            _check_types(wrapped)
            yield
        except BaseException:
            wrapped.unload()
            raise
        if self.adapter is not None and is_first_rank():
            save_adapter(wrapped, self.adapter)
        merge_lora(wrapped)

    @contextmanager
    def _still_rows(self) -> Iterator[None]:
        """Keep experts that do not train as they are, where others of their stack do; check it at the end."""
        if not self.report.rows:
            yield
            return
        if self.distribution is not None:
            raise BadConfig("single experts cannot train while ranks share the experts", hint="train on one rank")
        self.rows_kept = ExpertRows(self.base, self.report.row_masks(self.base))
        self.rows_kept.start()
        try:
            yield
        finally:
            self.rows_kept.stop()
        self.rows_kept.check()

    def meet(self, output: Path) -> None:
        """Wait until the first rank has cleared up."""
        args = self._arguments(output, keep=True, held=False)
        if args.world_size > 1 and dist.is_initialized():
            dist.barrier()

    def _arguments(self, folder: Path, keep: bool, held: bool) -> TrainingArguments:
        changes = {} if keep else {"save_every": None}
        changes |= {} if held else {"eval_every": None}
        return training_arguments(
            self.config.model_copy(update=changes), folder, self.steps, self.base.device, len(self.texts.rows)
        )

    def finished(self, output: Path) -> TrainResult | None:
        """The result of a run that ended already, its weights read; None if it did not."""
        if not (output / RESULT_FILE).exists():
            return None
        result = TrainResult.model_validate_json(read_text(output / RESULT_FILE))
        if self.distribution is not None:
            self.distribution.load(self.model, None, output / RANKS)
        else:
            load_changing(self.model, output)
        return result

    def execute(
        self, folder: Path, heldout: TokenBatches | None, *, keep: bool, progress: Progress | None
    ) -> TrainResult:
        """Train, or continue, to the end."""
        args = self._arguments(folder, keep, heldout is not None)
        config = self.config
        callback = MoECallback(
            self.terms,
            balancer=config.balancer,
            every=max(self.steps // WINDOWS, 1),
            texts=len(self.texts.rows),
        )
        schedules = config.moving()
        knobs = Knobs(self.base, callback)
        knobs.check(schedules, self.steps)
        with ExitStack() as stack:
            stack.enter_context(attention_for(self.base, config.seq_len))
            self._check_own_loss()
            # Asked before weights are held in bf16; a loss of the family's own has more terms than are read there.
            head = None if self._own_loss else readable_head(self.base)
            stack.enter_context(frozen_weights_in(self.model, self.precision))
            stack.enter_context(experts_for(self.base, self.precision))
            stack.enter_context(checkpointed_activations(self.base, config.activation_checkpointing))
            trainer = RunTrainer(
                self.model,
                config,
                self.precision,
                args,
                self.texts.dataset(numbered=self.teacher is not None and not self.teacher.complete),
                callback,
                head=head,
                teacher=self.teacher,
                rows_kept=self.rows_kept,
                heldout=None if heldout is None else OrderedRows(heldout, range(len(heldout))),
                progress=progress,
                distribution=self.distribution,
            )
            callback.install(trainer)
            trainer.add_callback(CompleteCheckpoints())
            if schedules:
                trainer.add_callback(ScheduleCallback(knobs, schedules))
            if (pruner := residual_rows(self.base)) is not None:
                trainer.add_callback(pruner)
            try:
                done = self._loop(trainer, last_complete_checkpoint(folder), heldout is not None, progress)
            finally:
                callback.detach()
                trainer.close()
        result = self._result(trainer.state.log_history, callback, done)
        if keep and self.distribution is not None:
            self.distribution.save(self.model, None, folder / RANKS)
        if keep and trainer.is_world_process_zero():
            self._keep(folder, result)
        return result

    def _check_own_loss(self) -> None:
        """Leave the family's own auxiliary loss out where the family itself fails to compute it."""
        if not self._own_loss:
            return
        if not computes_loss(self.base):
            self._own_loss = self.base.config.get_text_config().output_router_logits = False
        self._notes = [_OWN_LOSS + (_KEPT if self._own_loss else _LEFT_OUT)]

    def _loop(self, trainer: RunTrainer, start: Path | None, held: bool, progress: Progress | None) -> int:
        """Run the trainer; returns the step it continued from."""
        done = 0 if start is None else int(start.name.rpartition("-")[2])
        if progress is not None:
            progress.start("training", self.steps)
            if done:
                progress.advance(done, note=f"continued from step {done}")
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            if held:
                trainer.evaluate()
        finally:
            if progress is not None:
                progress.finish()
        return done

    def _result(self, history: list[dict[str, float]], callback: MoECallback, done: int) -> TrainResult:
        logged = [entry for entry in history if "loss" in entry]
        return TrainResult(
            steps=self.steps,
            tokens=self.texts.tokens,
            seconds=sum(entry["seconds"] for entry in logged),
            losses=[entry["loss"] for entry in logged],
            heldout_losses={int(entry["step"]): entry["eval_loss"] for entry in history if "eval_loss" in entry},
            history=logged,
            routing=callback.figures,
            precision=self.precision,
            trained=self.report.trained,
            parameters=self.report.parameters,
            resumed_from=done or None,
            notes=[*callback.notes, *self._notes],
        )

    def _keep(self, output: Path, result: TrainResult) -> None:
        """Replace the checkpoints by what was learnt and the result; the latter's presence says that the run ended."""
        if self.distribution is None:
            scratch = output / "unfinished"
            scratch.mkdir(exist_ok=True)
            save_changing(self.model, scratch)
            os.replace(scratch / STATE_FILE, output / STATE_FILE)
            scratch.rmdir()
        atomic_write(output / RESULT_FILE, result.model_dump_json(indent=1))
        for _, path in checkpoints(output):
            shutil.rmtree(path)
