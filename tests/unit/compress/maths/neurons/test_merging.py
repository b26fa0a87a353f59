"""Merging against sums written out, and against the functions that merged experts compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.compress.maths.neurons.align import align_experts
from moekit.compress.maths.neurons.merging import member_shares, merge_groups
from moekit.compress.weights import LayerWeights, outputs


def layer(experts: int, width: int = 32, hidden: int = 16, dtype: torch.dtype = torch.float32) -> LayerWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return LayerWeights(
        up_EIH=draw(experts, width, hidden),
        down_EHI=draw(experts, hidden, width),
        gate_EIH=draw(experts, width, hidden),
        up_bias_EI=draw(experts, width),
        gate_bias_EI=draw(experts, width),
        down_bias_EH=draw(experts, hidden),
        router={"weight": draw(experts, hidden), "bias": draw(experts), "choice": draw(experts).float()},
    )


def shuffled_copies(weights: LayerWeights) -> LayerWeights:
    """Every expert is the first one with its neurons in an order of its own."""
    orders = [torch.randperm(weights.width, generator=torch.Generator().manual_seed(e)) for e in range(weights.experts)]
    orders[0] = torch.arange(weights.width)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.stack([t[0][order] for order in orders])

    up = rows(weights.up_EIH)
    assert up is not None
    assert weights.down_bias_EH is not None
    return LayerWeights(
        up_EIH=up,
        down_EHI=torch.stack([weights.down_EHI[0][:, order] for order in orders]),
        gate_EIH=rows(weights.gate_EIH),
        up_bias_EI=rows(weights.up_bias_EI),
        gate_bias_EI=rows(weights.gate_bias_EI),
        down_bias_EH=weights.down_bias_EH[:1].expand_as(weights.down_bias_EH),
        router=weights.router,
    )


def test_shares_by_hand() -> None:
    shares = member_shares(torch.tensor([2, 1, 2, 1]), [(0, 1), (2, 3)])
    assert shares == ((pytest.approx(2 / 3), pytest.approx(1 / 3)), (pytest.approx(2 / 3), pytest.approx(1 / 3)))
    assert member_shares(torch.tensor([0, 7, 0, 0]), [(0, 2, 3), (1,)]) == ((1 / 3, 1 / 3, 1 / 3), (1.0,))
    assert member_shares(torch.tensor([0, 7]), [(0, 1)]) == ((0.0, 1.0),)


def test_shares_of_any_group_sum_to_one() -> None:
    load = torch.randint(0, 10**9, (64,), generator=torch.Generator().manual_seed(0))
    for share in member_shares(load, [range(0, 5), range(5, 40), range(40, 64)]):
        assert sum(share) == pytest.approx(1.0, abs=1e-12)


def test_two_experts_are_summed_by_their_shares_router_rows_too() -> None:
    weights = layer(3)
    merged = merge_groups(weights, (1, 2), [(0, 1), (2,)], [(0.25, 0.75), (1.0,)])
    for got, first, second in zip(merged.expert(0), weights.expert(0), weights.expert(1), strict=True):
        torch.testing.assert_close(got, 0.25 * first + 0.75 * second)
    for name, tensor in weights.router.items():
        torch.testing.assert_close(merged.router[name][0], 0.25 * tensor[0] + 0.75 * tensor[1])
        assert torch.equal(merged.router[name][1], tensor[2])
    assert merged.experts == 2


def test_a_representatives_router_row_may_stay() -> None:
    weights = layer(3)
    merged = merge_groups(weights, (1, 2), [(0, 1), (2,)], [(0.25, 0.75), (1.0,)], router="representative")
    for name, tensor in weights.router.items():
        assert torch.equal(merged.router[name], tensor[1:])
    assert not torch.equal(merged.up_EIH[0], weights.up_EIH[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_alone_is_copied_bit_for_bit(dtype: torch.dtype) -> None:
    weights = layer(4, dtype=dtype)
    before = weights.map(torch.clone)
    merged = merge_groups(weights, range(4), [(e,) for e in range(4)], [(1.0,)] * 4, match=_never)
    for e in range(4):
        assert all(torch.equal(a, b) for a, b in zip(merged.expert(e), weights.expert(e), strict=True))
    assert all(torch.equal(merged.router[n], t) for n, t in weights.router.items())
    # A copy, not the layer itself: what changes one must not change the other.
    merged.up_EIH.zero_()
    assert torch.equal(weights.up_EIH, before.up_EIH)


def _never(reference: int, member: int) -> Tensor:
    raise AssertionError(f"{member} needs no alignment to {reference}")


def test_members_without_a_share_are_not_looked_at() -> None:
    weights = layer(3)
    weights.up_EIH[1] = float("nan")
    merged = merge_groups(weights, (0, 2), [(0, 1), (2,)], [(1.0, 0.0), (1.0,)], match=_never)
    assert all(torch.equal(a, b) for a, b in zip(merged.expert(0), weights.expert(0), strict=True))


def test_sums_are_taken_in_fp32() -> None:
    weights = layer(8, dtype=torch.bfloat16)
    shares = member_shares(torch.arange(1, 9), [range(8)])
    merged = merge_groups(weights, (7,), [range(8)], shares)
    exact = torch.stack([s * weights.up_EIH[e].double() for e, s in enumerate(shares[0])]).sum(0).to(torch.bfloat16)
    coarse = torch.zeros_like(exact)
    for e, share in enumerate(shares[0]):
        coarse += share * weights.up_EIH[e]
    assert merged.up_EIH.dtype == torch.bfloat16
    # One rounding at the end, which fp32 and fp64 take the same way but for ties.
    assert (merged.up_EIH[0] != exact).double().mean() < 0.01 < 0.3 < (coarse != exact).double().mean()
    assert merged.router["choice"].dtype == torch.float32


def test_shuffled_copies_merge_to_the_same_function_only_when_aligned() -> None:
    weights = shuffled_copies(layer(4)).map(lambda t: t.double())
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted = outputs(weights, 0, x, torch.nn.functional.silu)
    groups, shares = [(0, 1, 2, 3)], [(0.4, 0.3, 0.2, 0.1)]

    def error(merged: LayerWeights) -> float:
        return float((outputs(merged, 0, x, torch.nn.functional.silu) - wanted).norm() / wanted.norm())

    aligned = merge_groups(weights, (0,), groups, shares, match=lambda r, m: align_experts(weights, r, m).order_I)
    assert error(aligned) < 1e-14
    assert error(merge_groups(weights, (0,), groups, shares)) > 0.5


def test_integers_are_the_representatives() -> None:
    weights = layer(2)
    typed = LayerWeights(weights.up_EIH, weights.down_EHI, others={"kind": torch.tensor([[3], [8]])})
    merged = merge_groups(typed, (1,), [(0, 1)], [(0.5, 0.5)])
    assert merged.others["kind"].tolist() == [[8]]
