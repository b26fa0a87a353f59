"""What a total sparsity means after two stages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.anatomy import Geometry
from moekit.compress.budget.sparsity import Count, count_zeros, remaining_sparsity, total_sparsity
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.prune.stun import Stun
from moekit.compress.sparsify.magnitude import Magnitude
from moekit.compress.sparsify.wanda import Wanda
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics

EXPERTS, WIDTH, HIDDEN = 8, 20, 32


def test_by_hand() -> None:
    assert remaining_sparsity(0.4, 0.2) == pytest.approx(0.25)  # 20 % of the experts, 40 % in all
    assert remaining_sparsity(0.65, 0.125) == pytest.approx(0.6)
    assert remaining_sparsity(0.5, 0.0) == 0.5
    assert remaining_sparsity(0.25, 0.25) == 0.0
    # Experts are .9 of a model; a fifth of them (.18) went; only the .72 left may hold zeros.
    assert remaining_sparsity(0.45, 0.18, prunable=0.72) == pytest.approx(0.375)
    assert total_sparsity(0.2, 0.25) == pytest.approx(0.4)


@settings(max_examples=60, deadline=None)
@given(removed=st.floats(0, 0.95), sparsity=st.floats(0, 0.99))
def test_both_ways(removed: float, sparsity: float) -> None:
    total = total_sparsity(removed, sparsity)
    assert remaining_sparsity(total, removed) == pytest.approx(sparsity, abs=1e-9)


def test_what_cannot_be_met_names_the_nearest() -> None:
    with pytest.raises(BadConfig, match=r"at least 0\.25"):
        remaining_sparsity(0.2, 0.25)
    with pytest.raises(BadConfig, match=r"below 0\.9"):
        remaining_sparsity(0.95, 0.2, prunable=0.7)
    for total, removed in ((1.0, 0.2), (-0.1, 0.0), (0.5, 1.0), (0.5, -0.1)):
        with pytest.raises(BadConfig, match="share"):
            remaining_sparsity(total, removed)
    for prunable in (0.0, 0.9):
        with pytest.raises(BadConfig, match="prunable"):
            remaining_sparsity(0.5, 0.2, prunable=prunable)


def test_counts_add_up() -> None:
    weights = LayerWeights(
        up_EIH=torch.tensor([[[0.0, 1.0], [-0.0, 2.0]]]),
        down_EHI=torch.tensor([[[0.0, 1.0], [1.0, 1.0]]]),
        up_bias_EI=torch.zeros(1, 2),
        router={"weight": torch.zeros(1, 2)},
    )
    found = count_zeros(weights)
    assert found == Count(3, 8)
    assert found + found == Count(6, 16)
    assert found.sparsity == 0.375
    assert found.gone_of(16) == 11 / 16  # eight went with an expert, three are zero
    assert Count().sparsity == 0.0


def layer() -> tuple[LayerWeights, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = LayerWeights(
        up_EIH=draw(EXPERTS, WIDTH, HIDDEN),
        down_EHI=draw(EXPERTS, HIDDEN, WIDTH),
        gate_EIH=draw(EXPERTS, WIDTH, HIDDEN),
        router={"weight": draw(EXPERTS, HIDDEN)},
    )
    values = {
        "load": torch.full((EXPERTS,), 9),
        "gated_output_norm": torch.rand(EXPERTS, generator=generator),
        "input_square": torch.rand(EXPERTS, HIDDEN, generator=generator),
        "inner_square": torch.rand(EXPERTS, WIDTH, generator=generator),
    }
    return weights, values


def inputs(weights: LayerWeights, values: dict[str, torch.Tensor]) -> LayerInputs:
    experts = weights.experts
    geometry = Geometry(HIDDEN, experts, 2, WIDTH, 0, True, False, False, True)
    return LayerInputs(0, geometry, LayerStatistics(experts, HIDDEN, values=values, width=WIDTH), lambda: weights)


@pytest.mark.parametrize("method", [Wanda(), Magnitude(), Magnitude(per="row")], ids=repr)
@pytest.mark.parametrize("total", [0.25, 0.4, 0.5, 0.65, 0.9])
def test_two_stages_meet_the_total(method: Wanda | Magnitude, total: float) -> None:
    weights, values = layer()
    original = count_zeros(weights).total
    seen, first = inputs(weights, values), Stun()
    outcome = first.decide(seen, first.score(seen), 6)
    fewer = first.transform(weights, outcome, seen)
    removed = count_zeros(fewer).gone_of(original)
    assert removed == 0.25
    left = {name: value[list(outcome.keep)] for name, value in values.items()}
    sparse = method.zeros(fewer, inputs(fewer, left), remaining_sparsity(total, removed))
    found = count_zeros(sparse).gone_of(original)
    assert total - 1 / min(WIDTH, HIDDEN) < found <= total + 1e-9
