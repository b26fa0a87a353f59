"""Reorder an expert's neurons so that they lie beside their like in another expert.

An expert computes the same whatever the order of its neurons, but a mean of two experts does not: neurons that do the
same job must be averaged with each other (arXiv:2310.01334, section 3.1; arXiv:2209.04836).

Legend: E experts, I expert width, H hidden, N tokens, F numbers that make up a neuron (3H, or 2H without a gate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moekit.compress.maths.clustering.spherical_kmeans import unit
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault, UnsupportedModel

# What two neurons' distance is: of the vectors themselves, squared, or of their directions, not squared.
Distance = Literal["squared", "directions"]

# Neurons at a time where costs are taken: keeps fp64 copies small.
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which neuron goes where.

    Attributes:
        order_I: position j takes neuron order_I[j], int64.
        cost: sum over neurons of the distance to their partners.
        before: the same sum with neurons where they were; never below `cost`.
    """

    order_I: Tensor
    cost: float
    before: float


def match_neurons(reference_IF: Tensor, member_IF: Tensor) -> Alignment:
    """Find the order of the member's neurons that is nearest to the reference's.

    Minimises sum_j ||reference_j - member_order(j)||^2 over all orders. Since squared norms do not depend on the order,
    this is the assignment of the largest sum of products, for which one matrix [I, I] suffices; products are taken in
    fp32 and sums of them solved in fp64.

    Args:
        reference_IF: neurons as vectors, such as `LayerWeights.neurons_EIF` gives.
        member_IF: neurons to be reordered.

    Returns:
        The order, with its cost in fp64; the neurons' own order where none is cheaper.

    Raises:
        NumericFault: a neuron holds NaN or infinity.
    """
    product_II = _finite(reference_IF.float() @ member_IF.float().T)
    # Rows come back ascending, so the columns are the order itself and not its inverse.
    _, columns = linear_sum_assignment(product_II.cpu().numpy(), maximize=True)
    order_I = torch.from_numpy(columns).to(torch.int64)
    cost, before = _cost(reference_IF, member_IF, order_I), _cost(reference_IF, member_IF, None)
    if cost >= before:
        return Alignment(torch.arange(len(order_I)), before, before)
    return Alignment(order_I, cost, before)


def direction_distances(reference_IF: Tensor, member_IF: Tensor) -> Tensor:
    """Euclidean distances of all pairs of neurons, each scaled to norm 1 (a neuron of zeros stays zero).

    Args:
        reference_IF: neurons as vectors.
        member_IF: neurons that may go beside them.

    Returns:
        [I, I] in fp32, or fp64 where neurons are; in [0, 2].
    """
    wide = torch.promote_types(torch.promote_types(reference_IF.dtype, member_IF.dtype), torch.float32)
    first_IF, second_IF = unit(reference_IF.to(wide)), unit(member_IF.to(wide))
    square_II = first_IF.square().sum(1)[:, None] + second_IF.square().sum(1) - 2 * first_IF @ second_IF.T
    return square_II.clamp_min(0).sqrt()


def match_directions(reference_IF: Tensor, member_IF: Tensor) -> Alignment:
    """Find the order of the member's neurons whose directions are nearest to the reference's (REAM, arXiv:2604.04356).

    Minimises sum_j || reference_j / ||reference_j|| - member_order(j) / ||member_order(j)|| ||: unlike in
    `match_neurons` large neurons count no more than small ones, nor far pairs more than near ones.

    Args:
        reference_IF: neurons as vectors.
        member_IF: neurons to be reordered.

    Raises:
        NumericFault: a neuron holds NaN or infinity.
    """
    return assigned(_finite(direction_distances(reference_IF, member_IF)))


def assigned(distance_II: Tensor) -> Alignment:
    """The order of least summed distance; the neurons' own order where none is cheaper.

    Args:
        distance_II: from each neuron of the reference to each of the member; finite.
    """
    distance_II = distance_II.double().cpu()
    _, columns = linear_sum_assignment(distance_II.numpy())
    order_I = torch.from_numpy(columns).to(torch.int64)
    own_I = torch.arange(len(order_I))
    cost, before = (float(distance_II[own_I, order].sum()) for order in (order_I, own_I))
    return Alignment(order_I, cost, before) if cost < before else Alignment(own_I, before, before)


@dataclass(eq=False)
class PairedActivations:
    """What two experts' neurons give on the same tokens, added up batch by batch: no activation is kept.

    Attributes:
        cross_II: sum over tokens of each neuron of the reference times each of the member; fp64 where the device has
            it.
        first_I: sum of squares of the reference's neurons.
        second_I: sum of squares of the member's.
    """

    cross_II: Tensor
    first_I: Tensor
    second_I: Tensor

    @classmethod
    def empty(cls, width: int, like: Tensor) -> PairedActivations:
        """Of no tokens, in the type and place of a tensor."""
        return cls(like.new_zeros(width, width), like.new_zeros(width), like.new_zeros(width))

    def add(self, reference_NI: Tensor, member_NI: Tensor) -> None:
        """Add some tokens; rows of both are the same tokens in the same order."""
        self.cross_II += (reference_NI.float().T @ member_NI.float()).to(self.cross_II)
        self.first_I += reference_NI.float().square().sum(0).to(self.first_I)
        self.second_I += member_NI.float().square().sum(0).to(self.second_I)

    @property
    def distance_II(self) -> Tensor:
        """Euclidean distances of neurons' activations over all tokens, each scaled to norm 1, in [0, 2].

        ||a - b||^2 = ||a||^2 + ||b||^2 - 2 ab; a neuron that never gives anything stays zero.
        """
        first_I, second_I = self.first_I.sqrt(), self.second_I.sqrt()
        scale_II = first_I[:, None] * second_I
        cosine_II = torch.where(scale_II > 0, self.cross_II / scale_II.clamp_min(torch.finfo(scale_II.dtype).tiny), 0.0)
        alive_II = (first_I > 0).to(cosine_II)[:, None] + (second_I > 0).to(cosine_II)
        return (alive_II - 2 * cosine_II).clamp_min(0).sqrt()


def add_distances(weights: LayerWeights, reference: int, member: int, activations_II: Tensor) -> Tensor:
    """Distance of neurons' directions plus that of their activations (REAM, section 3): [I, I].

    Raises:
        NumericFault: weights hold NaN or infinity; names no expert.
    """
    first_IF, second_IF = (single(weights, e).neurons_EIF()[0] for e in (reference, member))
    directions_II = _finite(direction_distances(first_IF, second_IF))
    return directions_II.to(activations_II) + activations_II


def _finite(pairs_II: Tensor) -> Tensor:
    if not bool(pairs_II.isfinite().all()):
        raise NumericFault(
            "neurons hold NaN or infinity, or their products overflow", hint="look at the weights: `moekit check`"
        )
    return pairs_II


def _cost(reference_IF: Tensor, member_IF: Tensor, order_I: Tensor | None) -> float:
    total = 0.0
    for start in range(0, len(reference_IF), _ROWS):
        rows = slice(start, start + _ROWS)
        partners_RF = member_IF[rows] if order_I is None else member_IF[order_I[rows].to(member_IF.device)]
        total += float((reference_IF[rows].double() - partners_RF.double()).square().sum())
    return total


def single(weights: LayerWeights, expert: int) -> LayerWeights:
    """One expert of a layer with its router row, E = 1; views, not copies."""
    return weights.map(lambda t: t[expert : expert + 1])


_MATCHES: dict[Distance, Callable[[Tensor, Tensor], Alignment]] = {
    "squared": match_neurons,
    "directions": match_directions,
}


def align_experts(weights: LayerWeights, reference: int, member: int, *, distance: Distance = "squared") -> Alignment:
    """Find the order in which a member's neurons lie beside those of a reference expert of the same layer.

    A neuron is its gate row, up row and down column joined; see `match_neurons` and `match_directions`.

    Args:
        weights: of the layer.
        reference: expert that stays as it is.
        member: expert whose neurons are to be reordered.
        distance: "squared" of neurons, or of their "directions".

    Raises:
        NumericFault: weights hold NaN or infinity; names the expert.
    """
    first_IF, second_IF = (single(weights, e).neurons_EIF()[0] for e in (reference, member))
    try:
        return _MATCHES[distance](first_IF, second_IF)
    except NumericFault as fault:
        broken = reference if not bool(first_IF.isfinite().all()) else member
        raise NumericFault(fault.message, expert=broken, hint=fault.hint) from fault


def permute_neurons(weights: LayerWeights, expert: int, order_I: Tensor) -> LayerWeights:
    """One expert with its neurons reordered, E = 1: position j takes neuron order_I[j]; what it computes stays.

    Rows of the gate and up projections move with their biases, and columns of the down projection; the bias of the down
    projection and the router row belong to no neuron.

    Args:
        weights: of the layer.
        expert: which expert.
        order_I: a permutation of the neurons.

    Raises:
        UnsupportedModel: experts have tensors of which it is not known how neurons lie in them.
    """
    if weights.others:
        raise UnsupportedModel(
            f"neurons cannot be reordered: it is not known where they lie in {', '.join(sorted(weights.others))}",
            expert=expert,
            hint="merge without alignment (--set align=none, or --set align=false of a pruning method)",
        )
    one = single(weights, expert)

    def moved(tensor: Tensor | None, axis: int = 1) -> Tensor | None:
        return None if tensor is None else tensor.index_select(axis, order_I.to(tensor.device))

    up_EIH, down_EHI = moved(one.up_EIH), moved(one.down_EHI, axis=2)
    assert up_EIH is not None
    assert down_EHI is not None
    return LayerWeights(
        up_EIH=up_EIH,
        down_EHI=down_EHI,
        gate_EIH=moved(one.gate_EIH),
        up_bias_EI=moved(one.up_bias_EI),
        gate_bias_EI=moved(one.gate_bias_EI),
        down_bias_EH=one.down_bias_EH,
        router=one.router,
    )
