"""Put a live model's experts onto ranks, and take them back.

A layer keeps the experts of its own rank, and a dispatcher stands in for their forward. Routers and all else stay
as they are, with logical expert ids.

Legend: N tokens, K choices, H hidden size, E experts, L own experts.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moekit import catalogue
from moekit.anatomy import MoELayer, find_moe_layers
from moekit.errors import BadConfig
from moekit.parallel.dispatcher import Dispatcher, DispatchOptions
from moekit.parallel.empty_batch import EmptyBatch
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.link import Link
from moekit.parallel.overlap import overlap_shared
from moekit.parallel.ranks import Ranks
from moekit.parallel.shared_batch import SharedBatch
from moekit.parallel.wire import Codec
from moekit.placement import Placement

DEFAULT = "once-per-rank"

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ExpertShard:
    """What expert parallelism did to one layer.

    Attributes:
        layer: decoder layer index.
        name: module path of the experts.
        experts: the module, which holds own experts only.
        layout: who owns which.
        ranks: process groups.
        dispatcher: stands in for the experts.
        stacked: names of the tensors that hold one slice for each expert.
        empty: whether the pass under way stands for a batch of no rows; one for the whole model.
        undo: takes the overlap with shared experts off.
    """

    layer: int
    name: str
    experts: Any
    layout: ExpertLayout
    ranks: Ranks
    dispatcher: Dispatcher
    stacked: tuple[str, ...]
    empty: EmptyBatch
    undo: Any = None

    @property
    def owned(self) -> Tensor:
        """Logical ids of the own experts, in local order: [L]."""
        return self.layout.owned(self.ranks.rank)


def make_dispatcher(name: str, layout: ExpertLayout, ranks: Ranks, *, codec: Codec = "none") -> Dispatcher:
    """A dispatcher by its catalogue name.

    Raises:
        BadConfig: unknown, or impossible on these ranks.
    """
    cls = catalogue.get("dispatch", name).cls
    assert issubclass(cls, Dispatcher)
    return cls.over(layout, ranks, DispatchOptions(codec=codec))


def expert_parallel(
    model: nn.Module,
    mesh: DeviceMesh | Ranks,
    *,
    dispatch: str = DEFAULT,
    placement: Placement | None = None,
    shared_batch: bool = False,
    codec: Codec = "none",
    overlap: bool = True,
) -> list[ExpertShard]:
    """Deal a model's experts out to ranks, in place.

    Every rank calls this with the same whole model and from then on holds its own experts only. Losses, gradients and
    generation are those of the whole model; expert gradients are sums over all ranks' tokens (see `moekit.parallel
    .gradients` for data-parallel training).

    Args:
        model: any transformers v5 MoE.
        mesh: which ranks share the experts; see `expert_mesh`.
        dispatch: catalogue name of the dispatcher.
        placement: rank of every expert, layer by layer; contiguous blocks by default, uneven where R does not divide E.
        shared_batch: all ranks hold the same tokens (generation); by default each has its own.
        codec: "int8" sends hidden states in 8 bits on the way out; lossy.
        overlap: compute shared experts while rows travel.

    Returns:
        One record a layer.

    Raises:
        BadConfig: already parallel; fewer experts than ranks; a placement for other layers, experts or devices.
    """
    ranks = mesh if isinstance(mesh, Ranks) else Ranks.of(mesh)
    if any(True for _ in shards(model)):
        raise BadConfig("the experts of this model are dealt out already", hint="gather_experts() takes them back")
    layers = find_moe_layers(model)
    if placement is not None:
        _check_placement(placement, layers, ranks)
    found = []
    empty = EmptyBatch()
    empty.install(model)
    for layer in layers:
        device = layer.experts.down_proj.device
        assert isinstance(device, torch.device)
        if placement is None:
            layout = ExpertLayout.contiguous(layer.geometry.experts, ranks.size, device)
        else:
            layout = ExpertLayout.make(placement.layers[layer.index], ranks.size, device)
        dispatcher = make_dispatcher(dispatch, layout, ranks, codec=codec)
        if dispatcher.needs_shared_batch and not shared_batch:
            raise BadConfig(
                f"{dispatch} needs ranks that hold the same tokens",
                hint="use it for generation, or choose once-per-rank for tokens of their own",
            )
        if shared_batch and not dispatcher.needs_shared_batch:
            dispatcher = SharedBatch.sharing(dispatcher, Link(ranks.group))
        found.append(_shard(layer, layout, ranks, dispatcher, empty, overlap))
    return found


def _check_placement(placement: Placement, layers: list[MoELayer], ranks: Ranks) -> None:
    if any(placement.replicas.values()):
        logger.warning("the placement has copies of experts; ranks run each expert where its owner is")
    if placement.devices != ranks.size:
        raise BadConfig(
            f"the placement is for {placement.devices} devices, not for {ranks.size} ranks",
            hint=f"place again with --devices {ranks.size}, or start {placement.devices} ranks",
        )
    for layer in layers:
        placed = placement.layers.get(layer.index)
        if placed is None or len(placed) != layer.geometry.experts:
            count = 0 if placed is None else len(placed)
            raise BadConfig(
                f"the placement places {count} experts, the layer has {layer.geometry.experts}",
                layer=layer.index,
                hint="it was made for another model: profile this one and place again",
            )


def shards(model: nn.Module) -> Iterator[ExpertShard]:
    """Layers whose experts are dealt out, in module order."""
    for module in model.modules():
        shard = getattr(module, "_moekit_shard", None)
        if isinstance(shard, ExpertShard):
            yield shard


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that this rank owns a part of, by their names in the model."""
    return {
        f"{shard.name}.{name}": parameter
        for shard in shards(model)
        for name, parameter in shard.experts.named_parameters(recurse=False)
        if name in shard.stacked
    }


def _shard(
    layer: MoELayer, layout: ExpertLayout, ranks: Ranks, dispatcher: Dispatcher, empty: EmptyBatch, overlap: bool
) -> ExpertShard:
    experts: Any = layer.experts  # attributes of its own are set on it
    total = layer.geometry.experts
    owned = layout.owned(ranks.rank)
    stacked = []
    for name, tensor in [*experts.named_parameters(recurse=False), *experts.named_buffers(recurse=False)]:
        if tensor.dim() and tensor.shape[0] == total:
            stacked.append(name)
            _replace(experts, name, tensor.detach().index_select(0, owned))
    own_forward = experts.forward
    experts.num_experts, experts.experts_in_layer = len(owned), total
    # Without it transformers' grouped kernel leaves NaN where a slot has no expert.
    experts._is_expert_parallel = True
    shard = ExpertShard(layer.index, layer.experts_name, experts, layout, ranks, dispatcher, tuple(stacked), empty)
    in_flight = overlap_shared(layer, dispatcher, empty) if overlap and layer.shared else None
    shard.undo = None if in_flight is None else in_flight.remove
    names = list(inspect.signature(own_forward).parameters)[:3]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, indices_NK, weights_NK = (given[name] for name in names)
        x_NH = hidden.reshape(-1, hidden.shape[-1])
        flight, tie = (None, None) if in_flight is None else in_flight.take(x_NH, indices_NK, weights_NK)
        if flight is None:
            # Of no tokens only the last size says how many choices each has.
            indices_NK, weights_NK = (t.reshape(-1, t.shape[-1]) for t in (indices_NK, weights_NK))
            flight = dispatcher.dispatch(x_NH, *empty.choices(indices_NK, weights_NK, total))
            if in_flight is not None:
                in_flight.compute_shared(hidden)
        summed: Tensor = dispatcher.combine(flight, own_forward)
        if tie is not None:
            summed = summed + tie
        return summed.to(hidden.dtype).view(hidden.shape)

    experts.forward = forward
    experts._moekit_shard = shard
    return shard


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put another tensor in a parameter's or buffer's place."""
    old = module._parameters.get(name)
    if old is not None:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[name] = tensor


def detach(model: nn.Module) -> None:
    """Take dispatchers off; every layer keeps only its own rank's experts, so the model can't be run until refilled."""
    for shard in list(shards(model)):
        shard.empty.remove()
        if shard.undo is not None:
            shard.undo()
        del shard.experts.forward
        del shard.experts._moekit_shard, shard.experts.experts_in_layer
        shard.experts.num_experts = shard.layout.experts
        shard.experts._is_expert_parallel = False


def gather_experts(model: nn.Module) -> None:
    """Undo `expert_parallel`: every rank gets all experts again, in logical order, and dispatchers go.

    Needs memory for the whole model on every rank; a checkpoint is written without it
    (`moekit.parallel.checkpoints.sharded`).
    """
    for shard in list(shards(model)):
        order = torch.cat([shard.layout.owned(rank) for rank in range(shard.layout.ranks)])
        for name in shard.stacked:
            parts = all_parts(getattr(shard.experts, name).detach(), shard)
            whole = parts.new_empty(shard.layout.experts, *parts.shape[1:])
            whole[order] = parts
            _replace(shard.experts, name, whole)
    detach(model)


def all_parts(own: Tensor, shard: ExpertShard) -> Tensor:
    """A stacked tensor's slices of all ranks, rank after rank; all ranks call it."""
    layout = shard.layout
    # Gathering wants equal parts.
    padded = own.new_zeros(layout.most, *own.shape[1:])
    padded[: len(own)] = own
    parts = Link(shard.ranks.group).all_gather(padded)
    starts = range(0, len(parts), layout.most)
    return torch.cat([parts[start : start + count] for start, count in zip(starts, layout.counts, strict=True)])
