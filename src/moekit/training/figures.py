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
        balance_loss: mean over micro-batches, 1.0 when uniform; None where routers give no logits.
        z_loss: mean over micro-batches; None where routers give no logits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    load: list[int]
    load_cv: float
    max_over_mean: float
    never_routed: int
    balance_loss: float | None
    z_loss: float | None


class RoutingFigures(BaseModel):
    """Routing of all layers.

    Attributes:
        layers: decoder layer index -> its figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: dict[int, LayerFigures]

    def _mean(self, name: str) -> float | None:
        """Mean over the layers that have this figure; None where none has."""
        values = [float(value) for layer in self.layers.values() if (value := getattr(layer, name)) is not None]
        return sum(values) / len(values) if values else None

    @property
    def load_cv(self) -> float:
        """Mean over layers."""
        return self._mean("load_cv") or 0.0

    @property
    def max_over_mean(self) -> float:
        """Mean over layers."""
        return self._mean("max_over_mean") or 0.0

    @property
    def balance_loss(self) -> float | None:
        """Mean over the layers whose routers give logits, 1.0 when uniform; None without any."""
        return self._mean("balance_loss")

    @property
    def never_routed(self) -> int:
        """Experts of all layers without a single choice."""
        return sum(layer.never_routed for layer in self.layers.values())

    def scalars(self) -> dict[str, float]:
        """What is logged: means over layers, the worst layer, and each layer that has experts without a choice."""
        losses = {"moe/balance_loss": self.balance_loss, "moe/z_loss": self._mean("z_loss")}
        logs = {
            **{name: value for name, value in losses.items() if value is not None},
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
        # Sums of balance and z loss; micro-batches for which they were given; all micro-batches.
        self._sums = {i: torch.zeros(4, dtype=torch.float64, device=device) for i in experts}

    def add(self, layer: int, load_E: Tensor, losses: tuple[Tensor, Tensor] | None = None) -> None:
        """Count one layer's answer for one micro-batch.

        Args:
            layer: decoder layer index.
            load_E: choices of each expert.
            losses: balance and z loss; None where the router gives no logits.
        """
        self._load[layer] += load_E.to(self._load[layer].device)
        sums = self._sums[layer]
        if losses is None:
            sums[3] += 1
            return
        balance, z = (loss.detach() for loss in losses)
        sums += torch.stack([balance, z, torch.ones_like(z), torch.ones_like(z)]).to(sums)

    def broken(self) -> int | None:
        """A layer whose logits have not been finite since the last reading; None if all were."""
        # One transfer for all layers: on a GPU each would wait for it.
        finite = torch.stack([sums.isfinite().all() for sums in self._sums.values()]).tolist()
        return next((layer for layer, fine in zip(self._sums, finite, strict=True) if not fine), None)

    def read(self) -> RoutingFigures | None:
        """Figures since the last reading, over all ranks, and start afresh; None if nothing was counted."""
        # Every rank reads at the same logging step, so the reductions meet.
        sum_over_ranks([*self._load.values(), *self._sums.values()])
        figures = {i: _figures(load_E, self._sums[i]) for i, load_E in self._load.items() if self._sums[i][3] > 0}
        for tensor in (*self._load.values(), *self._sums.values()):
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


def _figures(load_E: Tensor, sums: Tensor) -> LayerFigures:
    balance, z, count, _ = sums.tolist()
    mean = load_E.double().mean().clamp(min=1e-12)
    return LayerFigures(
        load=load_E.tolist(),
        load_cv=float(cv_squared(load_E).sqrt()),
        max_over_mean=float(load_E.max() / mean),
        never_routed=int((load_E == 0).sum()),
        balance_loss=balance / count if count else None,
        z_loss=z / count if count else None,
    )
