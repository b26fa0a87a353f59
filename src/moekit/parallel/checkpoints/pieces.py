"""What a model and its optimizer put into a sharded checkpoint on one rank: keys, and views of the live tensors.

Every expert is a tensor of its own under its logical id, so nothing in a checkpoint tells how experts were dealt out.

Legend: E experts, L own experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.fingerprint import untied_state_dict
from moekit.errors import BadConfig, UnsupportedModel
from moekit.parallel.checkpoints.index import WEIGHTS, ExpertsEntry
from moekit.parallel.sharding import shards


@dataclass(eq=False)
class Stack:
    """The experts of one layer, as far as this rank has them.

    Attributes:
        name: module path.
        entry: what the whole layer has.
        owned: logical ids of the own experts, in local order.
    """

    name: str
    entry: ExpertsEntry
    owned: list[int]


@dataclass(eq=False)
class Pieces:
    """Live tensors by key.

    Attributes:
        tensors: views that are written from and read into.
        numbers: optimizer states that are Python numbers.
        finish: what is left to do once the tensors have been read into.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: set[str] = field(default_factory=set)
    finish: list[Callable[[], None]] = field(default_factory=list)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel, whose names have no prefix."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """Layers with experts, dealt out or whole, by module path; none for a dense model."""
    dealt = list(shards(model))
    if dealt:
        return {
            s.name: Stack(
                s.name, ExpertsEntry(layer=s.layer, count=s.layout.experts, tensors=s.stacked), s.owned.tolist()
            )
            for s in dealt
        }
    try:
        layers = find_moe_layers(model)
    except UnsupportedModel:
        return {}
    found = {}
    for layer in layers:
        total = layer.geometry.experts
        tensors = [*layer.experts.named_parameters(recurse=False), *layer.experts.named_buffers(recurse=False)]
        names = tuple(name for name, tensor in tensors if tensor.dim() and tensor.shape[0] == total)
        entry = ExpertsEntry(layer=layer.index, count=total, tensors=names)
        found[layer.experts_name] = Stack(layer.experts_name, entry, list(range(total)))
    return found


def split(name: str, stacks: dict[str, Stack]) -> tuple[Stack | None, str]:
    """Layer and tensor name of a stacked tensor; (None, name) for any other."""
    path, _, tensor = name.rpartition(".")
    stack = stacks.get(path)
    return (stack, tensor) if stack is not None and tensor in stack.entry.tensors else (None, name)


def rows(stacked: Tensor, stack: Stack) -> Iterator[tuple[int, Tensor]]:
    """Logical id and slice of each own expert; FSDP2 may have cut the stack between experts once more.

    Raises:
        BadConfig: cut across experts.
    """
    local, first = stacked.detach(), 0
    if isinstance(stacked, DTensor):
        if any(not isinstance(p, Replicate) and p != Shard(0) for p in stacked.placements):
            raise BadConfig(
                f"{stack.name} is dealt out as {stacked.placements}: only whole experts can be saved",
                layer=stack.entry.layer,
                hint="shard experts along their first dimension",
            )
        _, offset = compute_local_shape_and_global_offset(stacked.shape, stacked.device_mesh, stacked.placements)
        local, first = stacked.to_local().detach(), offset[0]
    for row in range(len(local)):
        yield stack.owned[first + row], local[row]


def weights(model: nn.Module, stacks: dict[str, Stack]) -> Pieces:
    """Parameters and saved buffers, tied weights once."""
    pieces = Pieces()
    for name, tensor in untied_state_dict(model).items():
        stack, inner = split(name, stacks)
        if stack is None:
            pieces.tensors[f"{WEIGHTS}/{name}"] = tensor.detach()
            continue
        for expert, row in rows(tensor, stack):
            pieces.tensors[f"{WEIGHTS}/{stack.name}.{expert}.{inner}"] = row
    return pieces
