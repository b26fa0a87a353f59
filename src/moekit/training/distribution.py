"""What training asks of a model that several ranks hold together; `moekit.parallel` answers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from moekit.training.layers import TrainedLayer


class Distribution(Protocol):
    """How a model's parameters lie on ranks, and what follows for gradients and checkpoints."""

    @property
    def layers(self) -> list[TrainedLayer] | None:
        """The model's MoE layers, where its routers cannot be asked any more; None where they can."""

    @property
    def owns_data_parallel(self) -> bool:
        """Whether gradients are reduced already (FSDP): Trainer must not wrap the model in DDP."""

    def clip_gradients(self, model: nn.Module, limit: float) -> torch.Tensor:
        """Norm of all gradients over all ranks, every parameter once; scales them where it exceeds the limit."""

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path) -> None:
        """Write what this rank owns; all ranks call it."""

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path) -> None:
        """Read it back, onto these ranks, however many wrote it."""

    def identity(self) -> dict[str, Any]:
        """What of it makes a run another run; how many ranks work on it does not."""
