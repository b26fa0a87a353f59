"""Data parallelism beside expert parallelism: whose gradients are summed where, and by what they are divided.

Every rank has tokens of its own. Dense parameters are equal on all W ranks: DDP or FSDP2 averages their gradients over
W. An expert's owner has already summed over the tokens of all ranks that share the experts, by the dispatcher's
backward; what is left is to add up over ranks that own the same experts, and to divide by W as everywhere else.

Legend: W world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moekit.errors import BadConfig
from moekit.parallel.ranks import Ranks
from moekit.parallel.sharding import expert_parameters, shards
from moekit.training.layers import TrainedLayer, trained_layers

DataParallel = Literal["ddp", "fsdp"]


@dataclass(eq=False)
class RankedTraining:
    """How a model with dealt-out experts trains: see `moekit.training.distribution.Distribution`.

    Attributes:
        ranks: process groups of the experts.
        data_parallel: "ddp" keeps dense parameters whole on every rank, "fsdp" deals them out, too (FSDP2).
        facts: what makes a run another run: the model's fingerprint, the placement.
        layers: the model's MoE layers, found before FSDP2 deals out what its routers would answer with.
    """

    ranks: Ranks
    data_parallel: DataParallel = "ddp"
    facts: dict[str, Any] = field(default_factory=dict)
    layers: list[TrainedLayer] | None = None

    @property
    def owns_data_parallel(self) -> bool:
        """FSDP2 reduces gradients itself."""
        return self.data_parallel == "fsdp"

    def prepare(self, model: nn.Module) -> None:
        """Set gradients up; once, after the experts were dealt out, before an optimizer is made.

        Raises:
            BadConfig: the experts are not dealt out.
        """
        own = expert_parameters(model)
        if not own:
            raise BadConfig("the experts of this model are not dealt out", hint="call expert_parallel() first")
        world = dist.get_world_size()
        for parameter in own.values():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: grad / world)  # type: ignore[no-untyped-call]
        # Read by DistributedDataParallel: these it neither copies between ranks nor averages.
        model._ddp_params_and_buffers_to_ignore = [*own, *_own_buffers(model)]  # type: ignore[assignment]
        if self.data_parallel == "fsdp":
            self.layers = trained_layers(model)
            shard_dense(model)

    def sum_copies(self, model: nn.Module) -> None:
        """Add up gradients of experts that several ranks own; after backward, before the optimizer."""
        if self.ranks.copies is None:
            return
        for parameter in expert_parameters(model).values():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.ranks.copies)

    def clip_gradients(self, model: nn.Module, limit: float) -> Tensor:
        """Norm of all gradients, every parameter counted once; scales them where it exceeds `limit`."""
        self.sum_copies(model)
        own = {id(parameter) for parameter in expert_parameters(model).values()}
        mine: list[Tensor] = []
        dealt: list[Tensor] = []
        whole: list[Tensor] = []
        for parameter in model.parameters():
            if parameter.grad is not None:
                group = mine if id(parameter) in own else dealt if isinstance(parameter.grad, DTensor) else whole
                group.append(parameter.grad)
        squares = torch.stack([_squares(mine), _squares(dealt)])
        dist.all_reduce(squares[0], group=self.ranks.group)
        dist.all_reduce(squares[1])
        norm = (squares.sum() + _squares(whole)).sqrt()
        if math.isfinite(limit) and limit > 0:
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            for grad in (*mine, *dealt, *whole):
                _local(grad).mul_(scale.to(_local(grad).device))
        return norm

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path) -> None:
        """See `moekit.parallel.checkpoints.sharded.save_sharded`."""
        from moekit.parallel.checkpoints.sharded import save_sharded

        save_sharded(model, folder, optimizer=_plain(optimizer), overwrite=True)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path) -> None:
        """See `moekit.parallel.checkpoints.sharded.load_sharded`."""
        from moekit.parallel.checkpoints.sharded import load_sharded

        load_sharded(model, folder, optimizer=_plain(optimizer))

    def identity(self) -> dict[str, Any]:
        """What makes a run another run."""
        return dict(self.facts)


def shard_dense(model: nn.Module) -> None:
    """Deal everything but the experts out over all ranks (FSDP2), layer by layer.

    Args:
        model: its experts dealt out already; those parameters are left alone.
    """
    ignored = set(expert_parameters(model).values())
    blocks = {shard.name.split(".experts")[0].rpartition(".")[0] for shard in shards(model)}
    modules = dict(model.named_modules())
    for name in sorted(blocks):
        fully_shard(modules[name], ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)


def _own_buffers(model: nn.Module) -> Iterable[str]:
    """Buffers that hold one slice for each of the rank's experts."""
    for shard in shards(model):
        for name, _ in shard.experts.named_buffers(recurse=False):
            if name in shard.stacked:
                yield f"{shard.name}.{name}"


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _squares(grads: list[Tensor]) -> Tensor:
    """Sum of squares of what this rank holds of these, fp32."""
    parts = [_local(grad) for grad in grads]
    device = parts[0].device if parts else torch.device("cpu")
    total = torch.zeros((), device=device)
    for part in parts:
        total = total + part.float().square().sum()
    return total


def _plain(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer | None = getattr(optimizer, "optimizer", optimizer)
    return inner
