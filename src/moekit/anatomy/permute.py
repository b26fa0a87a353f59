"""Reorder the experts of a layer: expert weights, router rows and selection biases move together.

`order[new] = old`: position `new` holds what expert `old` was. The model computes the same function, so a permuted
checkpoint is stock and logit-equivalent; where devices own contiguous blocks, it says *which device* holds an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from moekit.anatomy.layout import DiskLayout
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.checkpoint.names import is_part_tensor
from moekit.errors import BadConfig, UnsupportedModel

PROBE_ROWS = 64


def check_order(order: Sequence[int], experts: int, layer: int) -> None:
    """Refuse what is no permutation of 0..E-1.

    Raises:
        BadConfig: naming the layer.
    """
    if sorted(order) != list(range(experts)):
        raise BadConfig(
            f"the order of {len(order)} entries is no permutation of the {experts} experts",
            layer=layer,
            hint="a placement must name each expert exactly once; was it made for another model?",
        )


def expert_axis(name: str, shape: Sequence[int], experts: int) -> int | None:
    """Dimension of a router tensor that counts experts; None if there is none.

    The first matching dimension: router matrices are [E, H] (rows are experts also where H = E), biases [E] or [1, E].
    """
    if "shared" in name:
        return None
    return next((axis for axis, size in enumerate(shape) if size == experts), None)


@torch.no_grad()
def _reorder(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> None:
    tensor.copy_(tensor.index_select(axis, index.to(tensor.device)))


def _permute_layer(layer: MoELayer, order: Sequence[int]) -> None:
    index = torch.tensor(order)
    count = layer.geometry.experts
    if layer.storage.kind != "stacked" or layer.storage.beyond:
        raise UnsupportedModel(
            f"{layer.experts_name!r} holds experts otherwise than as stacks of one tensor each",
            layer=layer.index,
            hint="their order cannot be changed: place them by their numbers as they are",
        )
    for tensor in (*layer.experts._parameters.values(), *layer.experts._buffers.values()):
        if tensor is not None and tensor.dim() > 0 and tensor.shape[0] == count:
            _reorder(tensor, 0, index)
    for name, tensor in _router_tensors(layer):
        axis = expert_axis(name, tensor.shape, count)
        if axis is not None:
            _reorder(tensor, axis, index)


def _router_tensors(layer: MoELayer) -> Iterator[tuple[str, torch.Tensor]]:
    """A router's own tensors, and those of its block; how those of attached parts follow, `moekit.runtime` knows."""
    router = layer.require_router()
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        if not is_part_tensor(name):
            yield name, tensor
    for name in layer.passed:
        yield name, getattr(layer.block, name)


def permute_experts(model: nn.Module, orders: Mapping[int, Sequence[int]]) -> None:
    """Reorder experts in place, and prove on random hidden states that the routers still choose the same experts.

    Args:
        model: live model; its runtime parts must be off (`moekit.runtime.without_parts`, then `permute_parts`).
        orders: decoder layer -> order, `order[new] = old`; layers not named stay as they are.

    Raises:
        BadConfig: an order is no permutation, or names a layer that is no MoE layer.
        UnsupportedModel: after reordering a router would choose differently (expert groups were torn apart). The
            layer is restored before the error.
    """
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    for index in orders:
        if index not in layers:
            raise BadConfig(f"layer {index} is no MoE layer; there are {sorted(layers)}", layer=index)
        check_order(orders[index], layers[index].geometry.experts, index)
    for index, order in orders.items():
        layer = layers[index]
        router = layer.require_router()
        like = next(router.parameters())
        generator = torch.Generator().manual_seed(0)
        hidden_TH = torch.randn(PROBE_ROWS, layer.geometry.hidden, generator=generator).to(like)
        before = layer.ask(hidden_TH)
        _permute_layer(layer, order)
        after = layer.ask(hidden_TH)
        if not _same_choice(before[2], after[2], order):
            _permute_layer(layer, inverse(order))
            raise UnsupportedModel(
                "reordering these experts would change which of them the router chooses",
                layer=index,
                hint="the family limits choices to expert groups: keep each group together in the placement",
            )


def _same_choice(before_TK: torch.Tensor, after_TK: torch.Tensor, order: Sequence[int]) -> bool:
    named_TK = torch.tensor(order, device=after_TK.device)[after_TK]
    return torch.equal(named_TK.sort(dim=-1).values, before_TK.sort(dim=-1).values)


def inverse(order: Sequence[int]) -> list[int]:
    """`inverse(order)[old] = new`."""
    result = [0] * len(order)
    for new, old in enumerate(order):
        result[old] = new
    return result


def permute_checkpoint(
    tensors: Iterable[tuple[str, torch.Tensor]],
    layout: DiskLayout,
    counts: Mapping[int, int],
    orders: Mapping[int, Sequence[int]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Reorder experts while streaming a checkpoint: split experts are renamed, stacked ones and routers reindexed.

    Args:
        tensors: (name, tensor) pairs, as `Checkpoint.stream` yields them; one at a time is held.
        layout: `find_expert_tensors` of all names.
        counts: decoder layer -> E.
        orders: decoder layer -> order, `order[new] = old`.

    Yields:
        (name, tensor) pairs of the permuted checkpoint. Prove the result with `moekit check` or `permute_experts`,
        which also notices groups torn apart.

    Raises:
        BadConfig: an order is no permutation.
    """
    for layer, order in orders.items():
        check_order(order, counts[layer], layer)
    experts = {t.name: t for group in layout.experts.values() for t in group}
    layer_of = {name: layout.experts[block][0].layer for block, names in layout.others.items() for name in names}
    for name, tensor in tensors:
        expert = experts.get(name)
        owner = expert.layer if expert else layer_of.get(name)
        if owner is None or owner not in orders:
            yield name, tensor
        elif expert is not None and expert.expert is not None:
            new = inverse(orders[owner])[expert.expert]
            head, _, rest = name[len(expert.block) :].partition(str(expert.expert))
            yield f"{expert.block}{head}{new}{rest}", tensor
        else:
            axis = expert_axis(name, tensor.shape, counts[owner]) if expert is None else 0
            yield name, tensor if axis is None else tensor.index_select(axis, torch.tensor(orders[owner]))


def expert_counts(shapes: Mapping[str, Sequence[int]], layout: DiskLayout) -> dict[int, int]:
    """Decoder layer -> E, from the names and shapes of a checkpoint's tensors, and `find_expert_tensors` of them."""
    counts: dict[int, int] = {}
    for block, group in layout.experts.items():
        split = layout.count(block)
        counts[group[0].layer] = split if split is not None else shapes[group[0].name][0]
    return counts
