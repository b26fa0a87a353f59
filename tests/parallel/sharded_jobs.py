"""What ranks are asked to do in tests of sharded checkpoints."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.errors import MoekitError
from moekit.parallel.checkpoints import storage as sharded_storage
from moekit.parallel.checkpoints.pieces import find_stacks, weights
from moekit.parallel.checkpoints.sharded import load_sharded, save_sharded
from moekit.parallel.checkpoints.states import optimizer_states
from moekit.parallel.ranks import Ranks
from moekit.parallel.sharding import expert_parallel, expert_parameters
from moekit.placement import Placement
from tests.parallel.jobs import tiny

TOKENS = torch.randint(3, 100, (4, 10), generator=torch.Generator().manual_seed(5))


class Run:
    """A tiny double-precision model in training, whole or with its experts dealt out."""

    def __init__(
        self,
        family: str,
        ranks: Ranks | None = None,
        placement: Placement | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.ranks = ranks
        self.model = tiny(family, options.get("policy", False), options.get("overrides")).double()
        self.model.set_experts_implementation("eager")  # grouped kernels know no double precision
        if seed:
            with torch.no_grad():
                for tensor in self.model.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.mul_(1.5)
        if ranks is not None:
            expert_parallel(self.model, ranks, placement=placement)
        self.own = {id(parameter) for parameter in expert_parameters(self.model).values()}
        if options.get("fsdp"):
            deal_out_dense(self.model)
        biases = [p for n, p in self.model.named_parameters() if p.dim() < 2]
        others = [p for n, p in self.model.named_parameters() if p.dim() >= 2]
        # With the usual eps of 1e-8, a gradient that nearly cancels is all rounding, and steps as far as any other one.
        groups = [{"params": others}, {"params": biases, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-5)

    def steps(self, first: int, count: int) -> None:
        """Optimizer steps; a step's number decides its tokens and its learning rate."""
        for number in range(first, first + count):
            tokens = (TOKENS + number) % 100 + 3
            rank, size = (self.ranks.rank, self.ranks.size) if self.ranks is not None else (0, 1)
            mine = tokens[rank::size]
            logits = self.model(input_ids=mine, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten(), reduction="sum"
            )
            (loss / tokens.numel()).backward()
            if self.ranks is not None:
                for parameter in self.model.parameters():
                    if id(parameter) not in self.own and parameter.grad is not None:
                        dist.all_reduce(parameter.grad, group=self.ranks.group)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 / (number + 1)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizer state of this rank, by the keys of a checkpoint."""
        stacks = find_stacks(self.model)
        pieces = weights(self.model, stacks).tensors | optimizer_states(self.model, self.optimizer, stacks).tensors
        whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in pieces.items()}
        return {key: value.detach().clone() for key, value in whole.items()}


def deal_out_dense(model: Any) -> None:
    """FSDP2 over all ranks for everything but the experts."""
    from torch.distributed.fsdp import fully_shard

    ignored = set(expert_parameters(model).values())
    for layer in model.model.layers:
        fully_shard(layer, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)


def train_and_save(
    ranks: Ranks, target: Path, family: str, placement: Placement | None = None, steps: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Begin a run, save it, and say what was saved."""
    run = Run(family, ranks, placement, **options)
    run.steps(0, steps)
    save_sharded(run.model, target, optimizer=run.optimizer, extra={"step": steps}, group=ranks.group)
    return run.state()


def resume(
    ranks: Ranks,
    source: Path,
    family: str,
    placement: Placement | None = None,
    *,
    target: Path | None = None,
    steps: int = 1,
    whole: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Go on from a checkpoint with a model that began elsewhere; states right after loading, and after the steps."""
    run = Run(family, None if whole else ranks, placement, seed=1, **options)
    loaded = load_sharded(run.model, source, optimizer=run.optimizer, group=ranks.group)
    found = run.state()
    run.steps(loaded.extra["step"], steps)
    if target is not None:
        extra = {"step": loaded.extra["step"] + steps}
        save_sharded(run.model, target, optimizer=run.optimizer, extra=extra, group=ranks.group)
    return found, run.state()


def train_some(ranks: Ranks, target: Path, family: str) -> dict[str, Tensor]:
    """Train without the second rank's experts, and save."""
    run = Run(family, ranks)
    for parameter in expert_parameters(run.model).values():
        parameter.requires_grad_(ranks.rank == 0)
    run.steps(0, 1)
    save_sharded(run.model, target, optimizer=run.optimizer, group=ranks.group)
    return run.state()


def dense_dealt_out(ranks: Ranks, source: Path, target: Path, family: str) -> dict[str, Tensor]:
    """Load onto experts dealt out and FSDP2 for the rest, and save from there."""
    run = Run(family, ranks, seed=1, fsdp=True)
    load_sharded(run.model, source, optimizer=run.optimizer, group=ranks.group)
    save_sharded(run.model, target, optimizer=run.optimizer, extra={"step": 1}, group=ranks.group)
    return run.state()


def failure(work: Callable[[], object]) -> tuple[str, str]:
    """Type and text of the error that some work ends with."""
    try:
        work()
    except MoekitError as error:
        return type(error).__name__, str(error)
    return "", ""


def save_on_small_disk(ranks: Ranks, target: Path, family: str, full: int, limit: int) -> tuple[str, str]:
    """Save while one rank may write no file beyond a limit."""
    run = Run(family, ranks)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return failure(lambda: save_sharded(run.model, target, group=ranks.group))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_over(ranks: Ranks, target: Path, family: str) -> tuple[str, str]:
    """Save where something is already."""
    run = Run(family, ranks)
    return failure(lambda: save_sharded(run.model, target, group=ranks.group))


def load_and_fail(ranks: Ranks, source: Path, family: str) -> tuple[str, str]:
    """Load what cannot be loaded."""
    run = Run(family, ranks)
    return failure(lambda: load_sharded(run.model, source, group=ranks.group))


def save_partly(ranks: Ranks, target: Path, family: str) -> tuple[str, str]:
    """Save from one rank's group alone, though others own experts, too."""
    run = Run(family, ranks)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return failure(lambda: save_sharded(run.model, target.with_name(f"{target.name}-{ranks.rank}"), group=alone))


def die_while_saving(rank: int, port: int, target: str, dying: int, told: Any) -> None:
    """One of two processes: the dying one kills itself in the middle of its file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    run = Run("qwen2_moe", Ranks(dist.group.WORLD))
    if rank == dying:
        write = sharded_storage.write_shard

        def half(path: Path, tensors: Any) -> int:
            write(path, tensors[: len(tensors) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        sharded_storage.write_shard = half
    told.send(failure(lambda: save_sharded(run.model, target)))
