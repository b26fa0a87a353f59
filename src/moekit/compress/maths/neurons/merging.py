"""Merge groups of experts into one expert each.

Legend: E experts, P groups, I expert width, M members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from moekit.compress.maths.neurons.align import permute_neurons, single
from moekit.compress.weights import LayerWeights

RouterRows = Literal["mean", "representative"]
# (reference, member) -> order [I] in which the member's neurons lie beside the reference's.
Match = Callable[[int, int], Tensor]


def member_shares(importance_E: Tensor, groups: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """How much of each merged expert comes from each member: importance / sum over the group (arXiv:2310.01334, eq. 2).

    Args:
        importance_E: how much each expert is worth, not negative, such as its load.
        groups: members of each group.

    Returns:
        For each group its members' shares, which sum to 1; equal shares where the importance of all members is 0.
    """
    worth = importance_E.detach().double().cpu().tolist()
    shares = []
    for group in groups:
        total = sum(worth[e] for e in group)
        shares.append(tuple(worth[e] / total if total > 0 else 1 / len(group) for e in group))
    return tuple(shares)


def merge_groups(
    weights: LayerWeights,
    representatives: Sequence[int],
    groups: Sequence[Sequence[int]],
    shares: Sequence[Sequence[float]],
    *,
    match: Match | None = None,
    router: RouterRows = "mean",
) -> LayerWeights:
    """Merge each group into one expert: sum over members of share times weights.

    One group is worked on at a time, in fp32 (fp64 where weights are), so that beside the layer and the result no more
    than two experts are held. A group of one member that counts is copied bit for bit.

    Args:
        weights: of the layer; not changed.
        representatives: for each group the member that others are aligned to, in the order of the result.
        groups: members of each group, the representative among them.
        shares: of the members.
        match: finds the order of a member's neurons; None merges neurons as they lie.
        router: a merged expert's router row (with biases) is the "mean" of the members' by their shares, or that of its
            "representative".

    Returns:
        P experts with their router rows.
    """
    result = weights.select(representatives)
    for position, (reference, group, share) in enumerate(zip(representatives, groups, shares, strict=True)):
        parts = [(e, s) for e, s in zip(group, share, strict=True) if s > 0]
        if [e for e, _ in parts] == [reference]:
            continue
        merged = _merge(weights, reference, parts, match)
        for target, value in zip(result.expert(position), merged.expert(0), strict=True):
            target.copy_(value)
        if router == "mean":
            for name, tensor in result.router.items():
                tensor[position].copy_(merged.router[name][0])
    return result


def _merge(
    weights: LayerWeights, reference: int, parts: Sequence[tuple[int, float]], match: Match | None
) -> LayerWeights:
    """Weighted sum of some experts, E = 1, in the wide type; tensors that are no floats are the reference's."""
    total = single(weights, reference).map(_zero)
    for expert, share in parts:
        if match is None or expert == reference:
            one = single(weights, expert)
        else:
            one = permute_neurons(weights, expert, match(reference, expert))
        for sum_, value in zip(_tensors(total), _tensors(one), strict=True):
            if value.is_floating_point():
                sum_.add_(value, alpha=share)
    return total


def _zero(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.clone()
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _tensors(one: LayerWeights) -> list[Tensor]:
    return [*one.expert(0), *(tensor[0] for tensor in one.router.values())]
