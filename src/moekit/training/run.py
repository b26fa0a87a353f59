"""`moekit.training.train`: one call, repeatable by its seed, continued after a kill as if nothing had happened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, set_seed

from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_write, lock
from moekit.data.batches import TokenBatches, check_vocabulary, pack
from moekit.data.text import Document
from moekit.errors import BadConfig
from moekit.training.callback import MoECallback
from moekit.training.compute import attention_for, checkpoint_activations, frozen_weights_in, resolve_precision
from moekit.training.config import TrainConfig, TrainResult
from moekit.training.freeze import FreezeReport, train_only
from moekit.training.head import sliced_cross_entropy
from moekit.training.identity import RESULT_FILE, prepare_folder, run_identity
from moekit.training.lora import add_lora, merge_lora
from moekit.training.order import OrderedRows, row_order
from moekit.training.resume import (
    STATE_FILE,
    CompleteCheckpoints,
    checkpoints,
    last_complete_checkpoint,
    load_changing,
    save_changing,
)
from moekit.training.trainer import RunTrainer, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# By so many figures of its routing a run is divided.
WINDOWS = 20


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[Document] | TokenBatches,
    config: TrainConfig,
    *,
    output: str | Path | None = None,
    heldout: Sequence[Document] | TokenBatches | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a model in place.

    The batches depend on the text, the seed and the sizes alone, so two models trained with one config see the same.
    With an `output` folder the run leaves checkpoints there; called again after a kill, it continues from the last
    complete one, and its losses are those of the unbroken run (bit for bit on a CPU with as many threads). Called again
    after it ended, it reads what it learnt.

    Args:
        model: a MoE model in fp32, with or without a routing policy; trained where it is (CPU or GPU).
        tokenizer: its tokenizer; None if the text is tokenized already.
        documents: text to train on, or its rows.
        config: the run's knobs.
        output: folder for checkpoints, `run.json` and `train.json`; None keeps nothing.
        heldout: text whose loss is taken every `eval_every` steps and at the end.
        resume: continue what is in `output`; False removes it and starts afresh.
        progress: told of each step.

    Returns:
        Losses, tokens, seconds and routing figures.

    Raises:
        BadConfig: the model or the tokenizer does not fit, or `output` holds another run.
        BadData: the text is empty.
        NumericFault: the loss or a router's logits became NaN or infinite.
    """
    _check_model(model)
    rows = _rows(model, tokenizer, documents, config, progress)
    held = None if heldout is None else _rows(model, tokenizer, heldout, config, progress)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = config.planned_steps(len(rows), world)
    order = row_order(len(rows), steps * config.batch * config.accumulation * world, config.seed)
    identity = run_identity(model, rows, config, steps, world)
    with ExitStack() as stack:
        # Every rank finds the same files; the first alone holds the lock.
        if output is not None and int(os.environ.get("RANK", "0")) == 0:
            Path(output).mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(Path(output)))
            prepare_folder(Path(output), identity, resume)
        stack.enter_context(_as_it_was(model))
        run = _Run(model, config, rows, order, steps, None if output is None else Path(output), progress)
        try:
            return run.finished() or run.execute(held)
        except BaseException:
            run.unload()
            raise


def _check_model(model: PreTrainedModel) -> None:
    coarse = next((n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize < 4), None)
    if coarse is not None:
        raise BadConfig(
            f"{coarse!r} is kept in {model.get_parameter(coarse).dtype}: small steps would be lost in rounding",
            hint="load it with dtype=float32; precision=bf16 then computes in bf16 over fp32 weights",
        )


def _rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[Document] | TokenBatches,
    config: TrainConfig,
    progress: Progress | None,
) -> TokenBatches:
    embedded = model.get_input_embeddings().weight.shape[0]
    if isinstance(documents, TokenBatches):
        if len(documents) == 0 or int(documents.input_ids.max()) >= embedded:
            raise BadConfig(f"the rows are empty or name tokens beyond the {embedded} that the model embeds")
        return documents
    if tokenizer is None:
        raise BadConfig("text needs a tokenizer", hint="give the model's tokenizer, or rows of token ids")
    check_vocabulary(tokenizer, embedded)
    return pack(documents, tokenizer, config.seq_len, pad=config.pad, end_token=config.end_token, progress=progress)


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
    """One run on a model that is set up for it."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        rows: TokenBatches,
        order: list[int],
        steps: int,
        output: Path | None,
        progress: Progress | None,
    ) -> None:
        self.base, self.config, self.rows, self.order = model, config, rows, order
        self.steps, self.output, self.progress = steps, output, progress
        self.precision = resolve_precision(config.precision, model.device)
        set_seed(config.seed)  # before adapters are drawn
        self.model = model if config.lora is None else add_lora(model, config.lora)
        self.report: FreezeReport = train_only(self.model, config.parts if config.lora is None else ("adapters",))

    def finished(self) -> TrainResult | None:
        """The result of a run that ended already, its weights read; None if it did not."""
        if self.output is None or not (self.output / RESULT_FILE).exists():
            return None
        result = TrainResult.model_validate_json((self.output / RESULT_FILE).read_text(encoding="utf-8"))
        load_changing(self.model, self.output)
        self._merge()
        return result

    def execute(self, heldout: TokenBatches | None) -> TrainResult:
        """Train, or continue, to the end."""
        with TemporaryDirectory() as unused:  # Trainer wants a folder even where nothing is kept
            return self._execute(heldout, self.output or Path(unused))

    def _execute(self, heldout: TokenBatches | None, folder: Path) -> TrainResult:
        config = self.config
        args = training_arguments(
            config if self.output else config.model_copy(update={"save_every": None}),
            folder,
            self.steps,
            self.base.device,
        )
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # the first rank may still be clearing up
        if heldout is None:
            args.eval_strategy = "no"
        held = None if heldout is None else OrderedRows(heldout, range(len(heldout)))
        if config.activation_checkpointing:
            checkpoint_activations(self.base, True)
        callback = MoECallback(
            balance_coef=config.balance_coef,
            z_coef=config.z_coef,
            importance_coef=config.importance_coef,
            bias_rate=config.bias_rate,
            every=max(self.steps // WINDOWS, 1),
        )
        start = None if self.output is None else last_complete_checkpoint(self.output)
        with (
            attention_for(self.base, config.seq_len),
            sliced_cross_entropy(self.base),
            frozen_weights_in(self.model, self.precision),
        ):
            trainer = RunTrainer(
                self.model,
                config,
                self.precision,
                args,
                OrderedRows(self.rows, self.order),
                heldout=held,
                progress=self.progress,
            )
            callback.install(trainer)
            if self.output is not None:
                trainer.add_callback(CompleteCheckpoints())
            try:
                result = self._loop(trainer, callback, start, held is not None)
            finally:
                callback.detach()
                if config.activation_checkpointing:
                    checkpoint_activations(self.base, False)
        if self.output is not None and trainer.is_world_process_zero():
            self._keep(result)
        self._merge()
        return result

    def _loop(self, trainer: RunTrainer, callback: MoECallback, start: Path | None, held: bool) -> TrainResult:
        done = 0 if start is None else int(start.name.rpartition("-")[2])
        if self.progress is not None:
            self.progress.start("training", self.steps)
            if done:
                self.progress.advance(done, note=f"continued from step {done}")
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            if held:
                trainer.evaluate()
        finally:
            if self.progress is not None:
                self.progress.finish()
        history = trainer.state.log_history
        logged = [entry for entry in history if "loss" in entry]
        lengths_R = (self.rows.document_RS >= 0).sum(dim=1)
        return TrainResult(
            steps=self.steps,
            tokens=int(lengths_R[torch.tensor(self.order)].sum()),
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

    def _keep(self, result: TrainResult) -> None:
        """Replace the checkpoints by what was learnt and the result; the latter's presence says that the run ended."""
        assert self.output is not None
        scratch = self.output / "unfinished"
        scratch.mkdir(exist_ok=True)
        save_changing(self.model, scratch)
        os.replace(scratch / STATE_FILE, self.output / STATE_FILE)
        scratch.rmdir()
        atomic_write(self.output / RESULT_FILE, result.model_dump_json(indent=1))
        for _, path in checkpoints(self.output):
            shutil.rmtree(path)

    def unload(self) -> None:
        """Take adapters off again, after a failure."""
        if self.config.lora is not None and hasattr(self.model, "unload"):
            self.model.unload()

    def _merge(self) -> None:
        if self.config.lora is not None:
            merge_lora(self.model)
