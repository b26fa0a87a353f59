"""`moekit.training.train`: one call, repeatable by its seed, continued after a kill as if nothing had happened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from moekit._files import read_text
from moekit._memory import naming_memory
from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_write, lock
from moekit.checkpoint.stored import mark_stored
from moekit.data import vocabulary
from moekit.data.batches import TokenBatches
from moekit.errors import BadConfig
from moekit.runtime.slots import learns
from moekit.training.callback import MoECallback
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
from moekit.training.head import readable_head
from moekit.training.identity import RESULT_FILE, prepare_folder, run_identity
from moekit.training.knobs import Knobs, ScheduleCallback
from moekit.training.layers import remembered_layers
from moekit.training.learning import check_routers_learn
from moekit.training.lora import add_lora, merge_lora
from moekit.training.memory import check_memory
from moekit.training.order import OrderedRows
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
from moekit.training.texts import MAIN, Text, Texts, read_rows
from moekit.training.trainer import RunTrainer, training_arguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# By so many figures of its routing a run is divided.
WINDOWS = 20


@naming_memory("training", "take a smaller batch or shorter rows, or a machine with more memory")
def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Text | Mapping[str, Text],
    config: TrainConfig,
    *,
    output: str | Path | None = None,
    heldout: Text | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    distribution: Distribution | None = None,
    teacher: Teacher | None = None,
) -> TrainResult:
    """Train a model in place.

    The batches depend on the text, the seed and the sizes alone, so two models trained with one config see the same.
    With an `output` folder the run leaves checkpoints there; called again after a kill, it continues from the last
    complete one, and its losses are those of the unbroken run (bit for bit on a CPU with as many threads). Called again
    after it ended, it reads what it learnt.

    Args:
        model: a MoE model in fp32, with or without a routing policy; trained where it is (CPU or GPU).
        tokenizer: its tokenizer; None if the text is tokenized already.
        documents: text to train on, or its rows; or several texts by name ("train", "retain", ...), which objectives
            read by their setting `text`.
        config: the run's knobs.
        output: folder for checkpoints, `run.json` and `train.json`; None keeps nothing.
        heldout: text whose loss is taken every `eval_every` steps and at the end.
        resume: continue what is in `output`; False removes it and starts afresh.
        progress: told of each step.
        distribution: how the model lies on ranks, if they share it (`moekit.parallel.data_parallel`); the same on each.
        teacher: what the objective `kd` holds the output against (`LiveTeacher`, `StoredTeacher`).

    Returns:
        Losses, tokens, seconds and routing figures.

    Raises:
        BadConfig: the model or the tokenizer does not fit, or `output` holds another run.
        BadData: the text is empty.
        NumericFault: the loss, a router's logits or the weights became NaN or infinite.
        OutOfBudget: memory cannot suffice, or did not.
    """
    return _train(
        model,
        tokenizer,
        documents if isinstance(documents, Mapping) else {MAIN: documents},
        config,
        output=None if output is None else Path(output),
        heldout=heldout,
        resume=resume,
        progress=progress,
        distribution=distribution,
        teacher=teacher,
    )


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Mapping[str, Text],
    config: TrainConfig,
    *,
    output: Path | None,
    heldout: Text | None,
    resume: bool,
    progress: Progress | None,
    distribution: Distribution | None,
    teacher: Teacher | None,
) -> TrainResult:
    """`train`, its arguments in one form."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = {name: read_rows(model, tokenizer, text, config, progress) for name, text in documents.items()}
    held = None if heldout is None else read_rows(model, tokenizer, heldout, config, progress)
    terms = config.terms()
    texts = Texts(rows, terms.texts, config, world)
    check_memory(model, config, texts.steps, world)
    terms.check_teacher(None if teacher is None else teacher.complete)
    if teacher is not None:
        for name in terms.taught_texts:
            teacher.check(texts.rows[name], vocabulary.output_size(model))
    identity = run_identity(model, texts, config, world, distribution, teacher)
    if distribution is not None and config.lora is not None:
        raise BadConfig("adapters cannot train while ranks share the experts", hint="train parts, or on one rank")
    if distribution is not None and learns(model):
        raise BadConfig(
            "what runtime parts learn cannot be kept while ranks share the experts", hint="train on one rank, or by DDP"
        )
    with ExitStack() as stack:
        # Every rank finds the same files; the first alone holds the lock.
        if output is not None and int(os.environ.get("RANK", "0")) == 0:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(output))
            prepare_folder(output, identity, resume)
        if distribution is not None and distribution.layers is not None:
            stack.enter_context(remembered_layers(model, distribution.layers))
        stack.enter_context(_as_it_was(model))
        mark_stored(model, None)  # small steps would be lost in the rounding of what it was stored in
        run = _Run(model, config, terms, texts, distribution, teacher)
        stack.enter_context(run.prepared())
        if output is None:  # Trainer wants a folder all the same
            return run.execute(Path(stack.enter_context(TemporaryDirectory())), held, keep=False, progress=progress)
        run.meet(output)
        return run.finished(output) or run.execute(output, held, keep=True, progress=progress)


def _check_types(model: nn.Module) -> None:
    """Refuse weights that train in a type in which small steps vanish; frozen ones may be kept in any."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            raise BadConfig(
                f"{name!r} trains, but is kept in {parameter.dtype}: small steps would be lost in rounding",
                hint="load it with dtype=float32; precision=bf16 then computes in bf16 over fp32 weights",
            )


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Give back mode, `requires_grad` and config when a run is over."""
    config = model.config.get_text_config()
    mode, flags = model.training, [(p, p.requires_grad) for p in model.parameters()]
    own_loss = getattr(config, "output_router_logits", None)
    if own_loss:
        # transformers' balance loss pools layers and re-derives the choice; ours replaces it.
        config.output_router_logits = False
    try:
        yield
    finally:
        model.train(mode)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        if own_loss:
            config.output_router_logits = own_loss


class _Run:
    """One run on one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        terms: Terms,
        texts: Texts,
        distribution: Distribution | None,
        teacher: Teacher | None,
    ) -> None:
        self.base, self.config, self.terms, self.texts, self.steps = model, config, terms, texts, texts.steps
        self.distribution, self.teacher = distribution, teacher
        self.rows_kept: ExpertRows | None = None
        self.precision = resolve_precision(config.precision, model.device)
        self.model: PreTrainedModel | PeftModel = model
        self.report = FreezeReport(trained={}, frozen={})

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Freeze, or put adapters on; at the end they are merged, after a failure taken off."""
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
            head = readable_head(self.base)  # asked before weights are held in bf16
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
