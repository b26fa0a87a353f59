"""transformers' Trainer, set up for MoE runs that repeat and resume exactly."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from moekit._progress import Progress
from moekit.data.batches import IGNORED_LABEL
from moekit.errors import NumericFault
from moekit.runtime.answering import telling_its_own_faults
from moekit.training.batch import MicroBatch
from moekit.training.callback import MoECallback
from moekit.training.chooser import require_chooser
from moekit.training.compute import Precision, compute_context
from moekit.training.config import TrainConfig
from moekit.training.distribution import Distribution
from moekit.training.figures import sum_over_ranks
from moekit.training.head import OutputInputs, OutputTap
from moekit.training.knobs import LR
from moekit.training.layers import moe_layers
from moekit.training.order import TEXT, collate
from moekit.training.resume import ExactResume
from moekit.training.rows import ExpertRows
from moekit.training.teacher import Teacher
from moekit.training.texts import MAIN

# What a balancer remembers from step to step, in a checkpoint.
BALANCER_FILE = "balancer.safetensors"


class _Report(TrainerCallback):  # type: ignore[misc]
    """Times each step, passes it to a progress bar, and stops where the loss is no number."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._since = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if math.isfinite(logs.get(name, 0.0)):
                continue
            # The weights hold it already; a checkpoint of them would be written after this line.
            raise NumericFault(
                f"the {name} is {logs[name]} at step {state.global_step}",
                hint="resume from the last checkpoint with a lower learning rate",
            )
        # What the last step did no loss has seen, and what is kept must be good.
        if control.should_save or state.global_step >= state.max_steps:
            check_finite(kwargs["model"], state.global_step)
        state.log_history[-1]["seconds"] = time.perf_counter() - self._since
        if self._progress is not None:
            self._progress.advance(1, note=f"loss {logs['loss']:.3f}")


@torch.no_grad()
def check_finite(model: nn.Module, step: int) -> None:
    """Refuse weights that are NaN, infinite, or so large that their squares are.

    Raises:
        NumericFault: naming the step and the parameter.
    """
    bad = ""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.requires_grad and not bool(local.float().square().sum().isfinite()):
            bad = name
            break
    device = next(model.parameters()).device
    found = torch.tensor(float(bool(bad)), device=device)
    sum_over_ranks([found])
    if bool(found):
        raise NumericFault(
            f"after step {step} {repr(bad) if bad else 'a weight on another rank'} is not finite, or its square is not",
            hint="resume from the last checkpoint with a lower learning rate",
        )


def training_arguments(
    config: TrainConfig, folder: Path, steps: int, device: torch.device, texts: int = 1
) -> TrainingArguments:
    """Trainer's settings for a run.

    Args:
        config: the run's knobs.
        folder: where checkpoints go.
        steps: optimizer steps.
        device: where the model is.
        texts: how many texts share the micro-batches of a step.
    """
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation * texts,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=config.warmup_steps(steps),
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.clip,
        optim="adamw_torch_fused",
        seed=config.seed,
        # Each step is logged: Trainer forgets what it has summed since the last log when it resumes.
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or steps,
        save_total_limit=2,
        eval_strategy="no" if config.eval_every is None else "steps",
        eval_steps=config.eval_every,
        prediction_loss_only=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
        include_num_input_tokens_seen="no",
        # Every weight takes part in every step; looking for those that don't walks the graph each time.
        ddp_find_unused_parameters=False,
    )


class RunTrainer(ExactResume, Trainer):  # type: ignore[misc]
    """Trainer of one run: rows in their given order, routers at their own rate, bf16 where asked.

    Args:
        model: the model, its parts frozen already.
        config: the run's knobs.
        precision: of matrix products.
        args: from `training_arguments`.
        rows: rows of the whole run, in order.
        heldout: held-out rows for the loss every `eval_every` steps.
        progress: told of each step.
        distribution: how the model lies on ranks, where more than data parallelism is at work.
        callback: told which micro-batch comes next; it holds the objectives.
        head: the output layer, if losses can be computed from what it reads (`readable_head`).
        teacher: asked for each micro-batch whose text an objective with a teacher reads.
        rows_kept: experts that must stay as they are.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        config: TrainConfig,
        precision: Precision,
        args: TrainingArguments,
        rows: Dataset[dict[str, Tensor]],
        callback: MoECallback,
        *,
        head: nn.Linear | None = None,
        teacher: Teacher | None = None,
        rows_kept: ExpertRows | None = None,
        heldout: Dataset[dict[str, Tensor]] | None = None,
        progress: Progress | None = None,
        distribution: Distribution | None = None,
    ) -> None:
        self.config = config
        self.precision = precision
        self.distribution = distribution
        self.callback = callback
        self.teacher = teacher
        self.rows_kept = rows_kept
        self._counts: dict[str, Tensor] = {}
        self._tap = OutputTap(model, head, self._output_loss)
        super().__init__(model, args, data_collator=collate, train_dataset=rows, eval_dataset=heldout)
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self.add_callback(_Report(progress))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objectives on outputs, in evaluation the cross-entropy alone; no key-value cache is built for it."""
        device = next(self.model.parameters()).device
        progress = self.state.global_step / max(self.state.max_steps, 1)
        text, rows_B = inputs.pop(TEXT, MAIN), inputs.pop("row", None)
        batch = MicroBatch(inputs["input_ids"], inputs.get("attention_mask"), text, self.state.global_step, progress)
        if self.model.training:
            if self.teacher is not None and self.callback.terms.ask_teacher(text):
                batch = replace(batch, teacher=self.teacher.output(batch, rows_B))
            if num_items_in_batch is not None:
                num_items_in_batch = self._counts.get(text, num_items_in_batch)
        self.callback.meet(batch)
        given = {**inputs, "use_cache": False}
        running = telling_its_own_faults(self.model)
        with compute_context(self.precision, device), self._tap.reading(batch), running:
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """As ever; where micro-batches are of several texts, each text's tokens are counted apart."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._counts.clear()
        if count is None or not batches or TEXT not in batches[0]:
            return batches, count
        for batch in batches:
            counted = (batch["labels"][..., 1:] != IGNORED_LABEL).sum().to(self.args.device)
            self._counts[batch[TEXT]] = self._counts.get(batch[TEXT], torch.zeros_like(counted)) + counted
        sum_over_ranks([self._counts[text] for text in sorted(self._counts)])
        return batches, count

    def _output_loss(self, inputs: OutputInputs) -> Tensor:
        return self.callback.terms.output_loss(inputs) if self.model.training else inputs.cross_entropy()

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._tap.close()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        biases = self.callback.biases
        if biases is not None and self.args.should_save and (state := biases.state()):
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, Path(output_dir) / BALANCER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / BALANCER_FILE).exists():
            self.callback.remembered = load_file(Path(checkpoint) / BALANCER_FILE)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As ever, or by the run's own schedule of `lr`; routers keep their share of it."""
        own = self.config.moving().get(LR)
        if own is None or self.lr_scheduler is not None:
            scheduler: torch.optim.lr_scheduler.LRScheduler = super().create_scheduler(num_training_steps, optimizer)
            return scheduler
        target = self.optimizer if optimizer is None else optimizer

        def factor(step: int) -> float:
            return own.value(min(step / num_training_steps, 1.0)) / self.config.lr

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, factor)
        return self.lr_scheduler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as ever, with the routers' parameters in groups of their own where they have their own rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.rows_kept is not None:
            self.add_callback(self.rows_kept.split_decay(optimizer))
        rate = self.config.router_lr
        if rate is None or rate == self.config.lr:
            return optimizer
        choosers = [require_chooser(layer)[1] for layer in moe_layers(self.model)]
        routers = {id(p) for chooser in choosers for p in chooser.parameters()}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in routers]
            if mine:
                group["params"] = [p for p in group["params"] if id(p) not in routers]
                optimizer.add_param_group({**group, "params": mine, "lr": rate})
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """As ever; a model whose gradients are reduced already is not wrapped in DDP."""
        super().create_accelerator_and_postprocess()
        if self.distribution is not None and self.distribution.owns_data_parallel:
            self.accelerator.prepare_model = lambda model, **_: model

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.distribution is None:
            return super()._clip_grad_norm(model)
        return self.distribution.clip_gradients(self.model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.distribution is not None and grad_norm is None:
            grad_norm = self.distribution.clip_gradients(self.model, math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Not counted: walking all parameters at every step costs more than it tells."""
        return 0.0
