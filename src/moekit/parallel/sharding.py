"""Put a live model's experts onto ranks, and take them back.

A layer keeps the experts of its own rank, and an experts part stands in for them that sends tokens by a dispatcher.
Routers and all else stay as they are, with logical expert ids: so do the parts of a record and recording, which stand
outside of it (see `moekit.runtime.experts`).

Legend: N tokens, K choices, H hidden size, E experts, L own experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moekit import catalogue
from moekit.anatomy import Geometry, MoELayer, find_moe_layers
from moekit.errors import BadConfig, UnsupportedModel
from moekit.parallel.dispatcher import Dispatcher, DispatchOptions
from moekit.parallel.empty_batch import EmptyBatch
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.link import Link
from moekit.parallel.overlap import SharedOverlap, overlap_shared
from moekit.parallel.ranks import Ranks
from moekit.parallel.shared_batch import SharedBatch
from moekit.parallel.wire import Codec
from moekit.placement import Placement
from moekit.runtime.experts import ExpertsInputs, ExpertsPart, TransientPart, refuse_other_calls
from moekit.runtime.hanging import Laid, lay, let_choose_none
from moekit.runtime.slots import parts_on, slots_in

DEFAULT = "once-per-rank"

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ExpertShard(TransientPart):
    """What expert parallelism did to one layer: the experts part that sends tokens to the ranks of their experts.

    Attributes:
        layer: decoder layer index.
        geometry: sizes of the whole layer.
        name: module path of the experts.
        experts: the module, which holds own experts only.
        router: of the layer.
        layout: who owns which.
        ranks: process groups.
        dispatcher: stands in for the experts.
        stacked: names of the tensors that hold one slice for each expert.
        empty: whether the pass under way stands for a batch of no rows; one for the whole model.
        overlap: with shared experts; None without.
        laid: takes the part off.
    """

    layer: int
    geometry: Geometry
    name: str
    experts: Any
    router: nn.Module | None
    layout: ExpertLayout
    ranks: Ranks
    dispatcher: Dispatcher
    stacked: tuple[str, ...]
    empty: EmptyBatch
    overlap: SharedOverlap | None = None
    laid: Laid | None = None

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """Every token's weighted sum, its experts run where they lie."""
        x_NH, indices_NK, weights_NK = inputs.hidden_TH, inputs.index_TK, inputs.weights_TK
        flight, tie = (None, None) if self.overlap is None else self.overlap.take(x_NH, indices_NK, weights_NK)
        if flight is None:
            choices = self.empty.choices(indices_NK, weights_NK, self.geometry.experts)
            flight = self.dispatcher.dispatch(x_NH, *choices)
            if self.overlap is not None:
                self.overlap.compute_shared(x_NH)
        summed: Tensor = self.dispatcher.combine(flight, inputs.run)
        if tie is not None:
            summed = summed + tie
        return summed.to(x_NH.dtype)

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
        BadConfig: already parallel; fewer experts than ranks; a placement for other layers, experts or devices; an
            attached part that reads the experts' weights. The model is as before.
        UnsupportedModel: a layer's experts do not follow the contract. The model is as before.
    """
    ranks = mesh if isinstance(mesh, Ranks) else Ranks.of(mesh)
    if any(True for _ in shards(model)):
        raise BadConfig("the experts of this model are dealt out already", hint="gather_experts() takes them back")
    layers = find_moe_layers(model)
    if placement is not None:
        _check_placement(placement, layers, ranks)
    # Whole or not at all: whatever any layer refuses, it refuses before the first one is cut.
    planned = []
    for layer in layers:
        refuse_other_calls(layer.experts, layer.index)
        _refuse_other_storage(layer)
        for part in parts_on(layer.experts):
            if ranks.size > 1 and isinstance(part, ExpertsPart):
                part.check_dealt_out(layer.index)
        layout = _layout(layer, ranks, placement)
        planned.append((layer, layout, _dispatcher(dispatch, layout, ranks, codec, shared_batch)))
    empty = EmptyBatch()
    empty.install(model)
    return [_shard(layer, layout, ranks, dispatcher, empty, overlap) for layer, layout, dispatcher in planned]


def _refuse_other_storage(layer: MoELayer) -> None:
    if layer.storage.kind != "stacked":
        raise UnsupportedModel(
            f"{type(layer.experts).__name__} holds its experts otherwise than as stacks of one tensor each",
            layer=layer.index,
            hint="experts of this family cannot be dealt out; FSDP deals out any parameters",
        )
    if layer.storage.beyond:
        raise UnsupportedModel(
            f"tokens may choose {layer.storage.beyond} experts that hold no weights: they belong to no rank",
            layer=layer.index,
            hint="experts of this family cannot be dealt out; FSDP deals out any parameters",
        )


def _layout(layer: MoELayer, ranks: Ranks, placement: Placement | None) -> ExpertLayout:
    device = layer.experts.down_proj.device
    assert isinstance(device, torch.device)
    if placement is None:
        return ExpertLayout.contiguous(layer.geometry.experts, ranks.size, device)
    return ExpertLayout.make(placement.layers[layer.index], ranks.size, device)


def _dispatcher(name: str, layout: ExpertLayout, ranks: Ranks, codec: Codec, shared_batch: bool) -> Dispatcher:
    """A dispatcher that works on the batches that ranks will have."""
    dispatcher = make_dispatcher(name, layout, ranks, codec=codec)
    if dispatcher.needs_shared_batch and not shared_batch:
        raise BadConfig(
            f"{name} needs ranks that hold the same tokens",
            hint="use it for generation, or choose once-per-rank for tokens of their own",
        )
    if shared_batch and not dispatcher.needs_shared_batch:
        return SharedBatch.sharing(dispatcher, Link(ranks.group))
    return dispatcher


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
    for _, slot in slots_in(model):
        for part in slot.transient:
            if isinstance(part, ExpertShard):
                yield part


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
    experts.num_experts, experts.experts_in_layer = len(owned), total
    let_choose_none(experts, True)
    shard = ExpertShard(
        layer=layer.index,
        geometry=layer.geometry,
        name=layer.experts_name,
        experts=experts,
        router=layer.router,
        layout=layout,
        ranks=ranks,
        dispatcher=dispatcher,
        stacked=tuple(stacked),
        empty=empty,
        overlap=overlap_shared(layer, dispatcher, empty) if overlap and layer.shared else None,
    )
    shard.laid = lay(layer, shard)
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
        if shard.overlap is not None:
            shard.overlap.remove()
        if shard.laid is not None:
            shard.laid.remove()
        del shard.experts.experts_in_layer
        shard.experts.num_experts = shard.layout.experts
        let_choose_none(shard.experts, bool(parts_on(shard.router) or parts_on(shard.experts)))


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
