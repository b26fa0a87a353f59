"""Checkpoints to continue from: complete or ignored, small, and exact for stacked experts.

transformers' Trainer writes a checkpoint file by file under its final name and later takes the highest number, complete
or not. And it restores weights by name: experts, which lie split on disk and stacked in memory, match nothing, so a
resumed MoE silently goes on with the experts it began with (transformers 5.23 warns of "missing keys"). Here a
checkpoint counts when a mark, written last, lists all its files; and it holds what training changes, under the names
it has in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit._files import open_regular, read_text
from moekit.checkpoint.atomic import atomic_write, is_disk_full
from moekit.errors import BadCheckpoint, OutOfBudget
from moekit.training.distribution import Distribution
from moekit.training.layers import trained_layers

MARK = "complete.json"
STATE_FILE = "training.safetensors"
# Folder of a checkpoint's weights and moments where ranks share a model.
RANKS = "ranks"
SCHEDULER_NAME = "scheduler.pt"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint below a run's folder, complete or not, in order of steps."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return sorted(found)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's mark is there and every file it lists has the size it says."""
    try:
        sizes = json.loads(read_text(checkpoint / MARK))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step; None without any."""
    complete = [path for _, path in checkpoints(Path(folder)) if is_complete(path)]
    return complete[-1] if complete else None


def remove_incomplete(folder: str | Path) -> list[Path]:
    """Remove checkpoints that a killed run left half-written; returns what was removed."""
    removed = [path for _, path in checkpoints(Path(folder)) if not is_complete(path)]
    for path in removed:
        shutil.rmtree(path)
    return removed


def mark_complete(checkpoint: Path) -> None:
    """Flush a checkpoint to disk, then write its mark."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK)
    for path in files:
        with open_regular(path) as stream:
            os.fsync(stream.fileno())
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    atomic_write(checkpoint / MARK, json.dumps({"files": sizes}, indent=1))


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, buffers that are saved, and selection biases."""
    biases = {layer.bias.data_ptr() for layer in trained_layers(model) if layer.bias is not None}
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    every_parameter = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    changing = {n: p.detach() for n, p in parameters.items() if p.requires_grad or p.data_ptr() in biases}
    return changing | {name: tensor for name, tensor in state.items() if name not in every_parameter}


def save_changing(model: nn.Module, folder: Path) -> None:
    """Write `changing_tensors` into a folder."""
    save_file({name: t.contiguous() for name, t in changing_tensors(model).items()}, folder / STATE_FILE)


@torch.no_grad()
def load_changing(model: nn.Module, folder: Path) -> None:
    """Read what `save_changing` wrote back into the model, bit for bit.

    Raises:
        BadCheckpoint: it holds other tensors than this model changes.
    """
    state = load_file(folder / STATE_FILE)
    wanted = changing_tensors(model)
    if state.keys() != wanted.keys() or any(state[n].shape != t.shape for n, t in wanted.items()):
        odd = sorted(state.keys() ^ wanted.keys()) or [n for n, t in wanted.items() if state[n].shape != t.shape]
        raise BadCheckpoint(
            f"does not fit what trains now, beginning with {odd[0]!r}",
            file=folder / STATE_FILE,
            hint="train the same parts of the same model, or start afresh in another folder",
        )
    for name, tensor in wanted.items():
        tensor.copy_(state[name])


def _disk_is_full(error: BaseException) -> bool:
    """Whether an error comes of a full disk, also where torch only says that it could not write."""
    causes: BaseException | None = error
    while causes is not None:
        if is_disk_full(causes):
            return True
        causes = causes.__cause__ or causes.__context__
    return "PytorchStreamWriter" in str(error)


class CompleteCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks each checkpoint when it is complete; with `last_complete_checkpoint`, for any Trainer, trl's too.

    >>> trainer.add_callback(CompleteCheckpoints())
    >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unmark checkpoints of an abandoned future, which this run will write anew."""
        if state.is_world_process_zero:
            for step, path in checkpoints(Path(args.output_dir)):
                if step > state.global_step:
                    (path / MARK).unlink(missing_ok=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint just written."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # every rank writes its random state
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class ExactResume:
    """Mixin for Trainer classes: checkpoints hold what training changes, and resuming restores it bit for bit.

    >>> class Trainer(ExactResume, SFTTrainer): ...

    Such a checkpoint continues a run; it is no model folder. `save_model` writes one as ever.
    """

    model: nn.Module
    args: TrainingArguments
    state: TrainerState
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    distribution: Distribution | None = None
    _only_changing = False

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._only_changing = True
        folder = Path(self.args.output_dir)
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:
            if _disk_is_full(error):
                shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
                raise OutOfBudget(
                    f"the disk is full: {shutil.disk_usage(folder).free:,} bytes are free",
                    file=folder,
                    hint="free some space and call again: the run continues from its last complete checkpoint",
                ) from error
            raise
        finally:
            self._only_changing = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self._only_changing or output_dir is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if self.distribution is not None or not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_changing(self.model, Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.distribution is not None:
            # Weights and moments together, each rank its own, in files that any number of ranks can open.
            self.distribution.save(self.model, self.optimizer, Path(output_dir) / RANKS)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            return
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.distribution is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        self.distribution.load(self.model, self.optimizer, Path(checkpoint) / RANKS)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.distribution is not None:
            return  # with the optimizer
        load_changing(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        load_changing(self.model, Path(best))
