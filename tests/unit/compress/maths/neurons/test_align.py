"""Alignment of neurons against trying every order, and against the function an expert computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moekit.compress.maths.neurons.align import align_experts, match_directions, match_neurons, permute_neurons, single
from moekit.compress.weights import LayerWeights, outputs
from moekit.errors import NumericFault, UnsupportedModel


def layer(
    experts: int = 3, width: int = 6, hidden: int = 5, *, gate: bool = True, bias: bool = True, seed: int = 0
) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return LayerWeights(
        up_EIH=draw(experts, width, hidden),
        down_EHI=draw(experts, hidden, width),
        gate_EIH=draw(experts, width, hidden) if gate else None,
        up_bias_EI=draw(experts, width) if bias else None,
        gate_bias_EI=draw(experts, width) if bias and gate else None,
        down_bias_EH=draw(experts, hidden) if bias else None,
        router={"weight": draw(experts, hidden), "bias": draw(experts)},
    )


def with_copy(weights: LayerWeights, source: int, target: int, order: Tensor) -> LayerWeights:
    """The layer in which one expert is another with its neurons in another order, written out neuron by neuron."""
    copied = weights.map(torch.clone)
    for new, old in enumerate(order.tolist()):
        copied.up_EIH[target, new] = weights.up_EIH[source, old]
        copied.down_EHI[target, :, new] = weights.down_EHI[source, :, old]
        if weights.gate_EIH is not None and copied.gate_EIH is not None:
            copied.gate_EIH[target, new] = weights.gate_EIH[source, old]
        if weights.up_bias_EI is not None and copied.up_bias_EI is not None:
            copied.up_bias_EI[target, new] = weights.up_bias_EI[source, old]
        if weights.gate_bias_EI is not None and copied.gate_bias_EI is not None:
            copied.gate_bias_EI[target, new] = weights.gate_bias_EI[source, old]
    if weights.down_bias_EH is not None and copied.down_bias_EH is not None:
        copied.down_bias_EH[target] = weights.down_bias_EH[source]
    return copied


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_the_best_of_all_orders(gate: bool, seed: int) -> None:
    weights = layer(2, 5, 4, gate=gate, seed=seed)
    matrices = [weights.up_EIH, weights.down_EHI.transpose(1, 2)]
    matrices += [weights.gate_EIH] if weights.gate_EIH is not None else []

    def cost(order: tuple[int, ...]) -> float:
        return sum(float((m[0, j] - m[1, i]).double().square().sum()) for m in matrices for j, i in enumerate(order))

    best = min(itertools.permutations(range(5)), key=cost)
    found = align_experts(weights, 0, 1)
    assert tuple(found.order_I.tolist()) == best
    assert found.cost == pytest.approx(cost(best))
    assert found.before == pytest.approx(cost((0, 1, 2, 3, 4)))
    assert found.cost <= found.before


def test_two_neurons_by_hand() -> None:
    # Distances: (0,0) 4 (0,1) 1 (1,0) 1 (1,1) 4; crossing costs 2, staying 8.
    found = match_neurons(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.0]]))
    assert (found.order_I.tolist(), found.cost, found.before) == ([1, 0], 2.0, 8.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_a_shuffled_copy_is_put_back(gate: bool, bias: bool) -> None:
    order = torch.tensor([3, 1, 4, 0, 5, 2])  # no involution: its inverse is another order
    weights = with_copy(layer(gate=gate, bias=bias), 0, 2, order)
    found = align_experts(weights, 0, 2)
    assert found.cost == 0.0 < found.before
    assert torch.equal(order[found.order_I], torch.arange(6))
    assert not torch.equal(found.order_I, order)
    restored = permute_neurons(weights, 2, found.order_I)
    assert all(torch.equal(a, b) for a, b in zip(restored.expert(0), weights.expert(0), strict=True))


@pytest.mark.parametrize("gate", [True, False])
def test_reordering_never_changes_what_an_expert_computes(gate: bool) -> None:
    weights = layer(gate=gate)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    moved = permute_neurons(weights, 1, order)
    assert not torch.equal(moved.up_EIH[0], weights.up_EIH[1])
    torch.testing.assert_close(
        outputs(moved, 0, x, torch.nn.functional.silu), outputs(weights, 1, x, torch.nn.functional.silu)
    )
    assert torch.equal(moved.router["weight"][0], weights.router["weight"][1])


def test_an_expert_beside_itself_stays_even_with_twin_neurons() -> None:
    weights = layer(2, 4)
    twins = with_copy(weights, 0, 0, torch.tensor([1, 1, 2, 2]))
    found = align_experts(twins, 0, 0)
    assert (found.order_I.tolist(), found.cost, found.before) == ([0, 1, 2, 3], 0.0, 0.0)


def test_half_precision_is_compared_in_full() -> None:
    order = torch.tensor([3, 1, 4, 0, 5, 2])
    # In fp16 squares of these weights overflow.
    weights = with_copy(layer(bias=False).map(lambda t: t * 300), 0, 1, order).map(lambda t: t.to(torch.float16))
    found = align_experts(weights, 0, 1)
    assert found.cost == 0.0
    assert permute_neurons(weights, 1, found.order_I).up_EIH.dtype == torch.float16


def test_one_expert_is_a_view() -> None:
    weights = layer()
    one = single(weights, 1)
    assert one.experts == 1
    assert one.up_EIH.data_ptr() == weights.up_EIH[1].data_ptr()


def test_damaged_weights_are_named() -> None:
    weights = layer()
    weights.down_EHI[2, 0, 0] = float("nan")
    with pytest.raises(NumericFault, match="NaN") as caught:
        align_experts(weights, 0, 2)
    assert "expert 2" in str(caught.value)


def test_tensors_of_unknown_layout_are_refused() -> None:
    weights = layer(bias=False)
    strange = LayerWeights(weights.up_EIH, weights.down_EHI, others={"scale": torch.ones(3, 6)})
    with pytest.raises(UnsupportedModel, match="scale") as caught:
        permute_neurons(strange, 0, torch.arange(6))
    assert "--set align=false" in str(caught.value.hint)


@pytest.mark.parametrize("seed", range(3))
def test_directions_lie_nearest_of_all_orders(seed: int) -> None:
    weights = layer(2, 5, 4, seed=seed)
    first, second = (single(weights, e).neurons_EIF()[0].double() for e in (0, 1))
    first, second = (t / t.norm(dim=1, keepdim=True) for t in (first, second))

    def cost(order: tuple[int, ...]) -> float:
        return sum(float((first[j] - second[i]).norm()) for j, i in enumerate(order))

    found = align_experts(weights, 0, 1, distance="directions")
    assert found.cost == pytest.approx(min(map(cost, itertools.permutations(range(5)))), rel=1e-5)
    assert found.cost == pytest.approx(cost(tuple(found.order_I.tolist())), rel=1e-5)
    assert found.before == pytest.approx(cost(tuple(range(5))), rel=1e-5)


def test_directions_of_damaged_and_of_silent_neurons() -> None:
    weights = layer(2)
    weights.up_EIH[1, 2, 0] = float("nan")
    with pytest.raises(NumericFault) as fault:
        align_experts(weights, 0, 1, distance="directions")
    assert fault.value.expert == 1
    silent = torch.zeros(4, 3)
    assert match_directions(torch.eye(4, 3), silent).order_I.tolist() == [0, 1, 2, 3]
