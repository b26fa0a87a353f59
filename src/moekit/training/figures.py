"""Routing figures of a training run: load, imbalance and losses per layer, over micro-batches and ranks.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit.training.losses import cv_squared


class LayerFigures(BaseModel):
    """Routing of one layer over the tokens of some optimizer steps.

    Attributes:
        load: choices per expert.
        load_cv: standard deviation over mean of the load; 0 is balanced, sqrt(E - 1) is all on one expert.
        max_over_mean: load of the busiest expert over the mean; 1 is balanced, E the worst.
        never_routed: experts without a single choice.
        balance_loss: mean over micro-batches, 1.0 when uniform.
        z_loss: mean over micro-batches.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    load: list[int]
    load_cv: float
    max_over_mean: float
    never_routed: int
    balance_loss: float
    z_loss: float


class RoutingFigures(BaseModel):
    """Routing of all layers.

    Attributes:
        layers: decoder layer index -> its figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: dict[int, LayerFigures]

    def _mean(self, name: str) -> float:
        values = [float(getattr(layer, name)) for layer in self.layers.values()]
        return sum(values) / max(len(values), 1)

    @property
    def load_cv(self) -> float:
        """Mean over layers."""
        return self._mean("load_cv")

    @property
    def max_over_mean(self) -> float:
        """Mean over layers."""
        return self._mean("max_over_mean")

    @property
    def balance_loss(self) -> float:
        """Mean over layers; 1.0 when uniform."""
        return self._mean("balance_loss")

    @property
    def never_routed(self) -> int:
        """Experts of all layers without a single choice."""
        return sum(layer.never_routed for layer in self.layers.values())

    def scalars(self) -> dict[str, float]:
        """What is logged: means over layers, the worst layer, and each layer that has experts without a choice."""
        logs = {
            "moe/balance_loss": self.balance_loss,
            "moe/z_loss": self._mean("z_loss"),
            "moe/load_cv": self.load_cv,
            "moe/load_cv_worst": max((layer.load_cv for layer in self.layers.values()), default=0.0),
            "moe/load_max_over_mean": self.max_over_mean,
            "moe/never_routed": float(self.never_routed),
        }
        for index, layer in self.layers.items():
            if layer.never_routed:
                logs[f"moe/never_routed/layer_{index}"] = float(layer.never_routed)
        return logs


class RoutingMeter:
    """Sums figures over micro-batches; its memory does not grow with them.

    Args:
        experts: decoder layer index -> E.
        device: where the routers are.
    """

    def __init__(self, experts: dict[int, int], device: torch.device) -> None:
        self._load = {i: torch.zeros(count, dtype=torch.int64, device=device) for i, count in experts.items()}
        self._losses = {i: torch.zeros(3, dtype=torch.float64, device=device) for i in experts}

    def add(self, layer: int, load_E: Tensor, balance: Tensor, z: Tensor) -> None:
        """Count one layer's answer for one micro-batch."""
        self._load[layer] += load_E.to(self._load[layer].device)
        sums = self._losses[layer]
        sums += torch.stack([balance.detach(), z.detach(), torch.ones_like(z)]).to(sums)

    def broken(self) -> int | None:
        """A layer whose logits have not been finite since the last reading; None if all were."""
        # One transfer for all layers: on a GPU each would wait for it.
        finite = torch.stack([sums.isfinite().all() for sums in self._losses.values()]).tolist()
        return next((layer for layer, fine in zip(self._losses, finite, strict=True) if not fine), None)

    def read(self) -> RoutingFigures | None:
        """Figures since the last reading, over all ranks, and start afresh; None if nothing was counted."""
        # Every rank reads at the same logging step, so the reductions meet.
        sum_over_ranks([*self._load.values(), *self._losses.values()])
        figures = {i: _figures(load_E, self._losses[i]) for i, load_E in self._load.items() if self._losses[i][2] > 0}
        for tensor in (*self._load.values(), *self._losses.values()):
            tensor.zero_()
        return RoutingFigures(layers=figures) if figures else None


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add tensors up over all ranks, in place; all ranks give as many, in the same order."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def _figures(load_E: Tensor, losses: Tensor) -> LayerFigures:
    balance, z, count = losses.tolist()
    mean = load_E.double().mean().clamp(min=1e-12)
    return LayerFigures(
        load=load_E.tolist(),
        load_cv=float(cv_squared(load_E).sqrt()),
        max_over_mean=float(load_E.max() / mean),
        never_routed=int((load_E == 0).sum()),
        balance_loss=balance / count,
        z_loss=z / count,
    )
