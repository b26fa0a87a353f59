"""GPTQ on a layer of experts: the right moment for each matrix, experts without tokens, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moekit.anatomy import Geometry
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.feedback import round_with_feedback, upper_factor
from moekit.compress.quantize.gptq import Gptq
from moekit.compress.quantize.rtn import RoundToNearest
from moekit.compress.weights import LayerWeights, outputs
from moekit.errors import BadConfig, NumericFault
from moekit.trace.expert_inputs import Moments
from moekit.trace.statistics import LayerStatistics

EXPERTS, HIDDEN, WIDTH, TOKENS = 3, 32, 16, 300
BITS = {"gate": (2, 3, 4), "up": (3, 3, 3), "down": (4, 3, 2)}
OUTCOME = LayerOutcome(keep=(0, 1, 2), bits=BITS)


def layer() -> LayerWeights:
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(EXPERTS, *size, generator=g) * 0.3

    return LayerWeights(up_EIH=draw(WIDTH, HIDDEN), gate_EIH=draw(WIDTH, HIDDEN), down_EHI=draw(HIDDEN, WIDTH))


def tokens(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(9))
    return torch.randn(TOKENS, 6, generator=g) @ mix + 0.2 * torch.randn(TOKENS, HIDDEN, generator=g)


def inner(weights: LayerWeights, expert: int, x_NH: Tensor) -> Tensor:
    assert weights.gate_EIH is not None
    return torch.nn.functional.silu(x_NH @ weights.gate_EIH[expert].T) * (x_NH @ weights.up_EIH[expert].T)


def measured(weights: LayerWeights, unseen: tuple[int, ...] = ()) -> LayerInputs:
    """Each expert saw tokens of its own, those named saw none."""
    outer, inside = torch.zeros(EXPERTS, HIDDEN, HIDDEN).double(), torch.zeros(EXPERTS, WIDTH, WIDTH).double()
    load = torch.zeros(EXPERTS, dtype=torch.int64)
    for e in range(EXPERTS):
        if e in unseen:
            continue
        x = tokens(e).double()
        h = inner(weights.map(Tensor.double), e, x)
        outer[e], inside[e], load[e] = x.T @ x, h.T @ h, TOKENS
    geometry = Geometry(HIDDEN, EXPERTS, 2, WIDTH, 0, True, False, False, True)
    statistics = LayerStatistics(EXPERTS, HIDDEN, values={"load": load}, width=WIDTH)
    return LayerInputs(5, geometry, statistics, read_moments=lambda e: Moments(e, TOKENS, outer[e], inside[e]))


def test_each_matrix_is_rounded_by_the_moment_of_its_own_inputs() -> None:
    weights = layer()
    seen = measured(weights)
    made = Gptq(group=8).transform(weights, OUTCOME, seen)
    for part, name in (("gate", "gate_EIH"), ("up", "up_EIH"), ("down", "down_EHI")):
        for e in range(EXPERTS):
            moments = seen.moments(e)
            upper = upper_factor(moments.inner_II if part == "down" else moments.inputs_HH, 0.01)
            assert upper is not None
            wanted = round_with_feedback(getattr(weights, name)[e], upper, BITS[part][e], 8)
            assert torch.equal(getattr(made, name)[e], wanted), (part, e)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_layers_output_is_nearer_than_with_plain_rounding(bits: int) -> None:
    weights = layer()
    outcome = LayerOutcome(keep=(0, 1, 2), bits={part: (bits,) * EXPERTS for part in ("gate", "up", "down")})
    seen = measured(weights)
    errors = []
    for method in (Gptq(group=8), RoundToNearest(group=8)):
        made = method.transform(weights, outcome, seen)
        gaps = [
            outputs(made, e, tokens(50 + e), torch.nn.functional.silu)
            - outputs(weights, e, tokens(50 + e), torch.nn.functional.silu)
            for e in range(EXPERTS)
        ]
        errors.append(float(torch.stack(gaps).norm()))
    assert errors[0] < 0.9 * errors[1]


def test_an_expert_without_tokens_is_rounded_to_nearest_and_named() -> None:
    weights = layer()
    seen, method = measured(weights, unseen=(1,)), Gptq(group=8)
    made = method.transform(weights, OUTCOME, seen)
    plain = RoundToNearest(group=8).transform(weights, OUTCOME, seen)
    for name in ("gate_EIH", "up_EIH", "down_EHI"):
        assert bool(getattr(made, name).isfinite().all())
        same = [torch.equal(getattr(made, name)[e], getattr(plain, name)[e]) for e in range(EXPERTS)]
        assert same == [False, True, False]
    assert method.figures(seen) == {"to_nearest": [1.0]}
    assert method.unseen((1,), OUTCOME) == ": rounded to nearest are 1"


def test_parts_that_are_not_named_stay() -> None:
    weights = layer()
    made = Gptq(group=8).transform(weights, LayerOutcome(keep=(0, 1, 2), bits={"down": (2, 2, 2)}), measured(weights))
    assert torch.equal(made.up_EIH, weights.up_EIH)
    assert not torch.equal(made.down_EHI, weights.down_EHI)


def test_what_is_not_finite_is_named() -> None:
    weights = layer()
    seen = measured(weights)
    broken = weights.up_EIH.clone()
    broken[2, 0, 0] = float("nan")
    with pytest.raises(NumericFault) as told:
        Gptq(group=8).transform(dataclasses.replace(weights, up_EIH=broken), OUTCOME, seen)
    assert (told.value.layer, told.value.expert) == (5, 2)
    seen.moments(1).inner_II[0, 0] = float("inf")
    with pytest.raises(NumericFault, match="second moments") as told:
        Gptq(group=8).transform(weights, OUTCOME, seen)
    assert (told.value.layer, told.value.expert) == (5, 1)


def test_groups_that_do_not_divide() -> None:
    weights = layer()
    with pytest.raises(BadConfig, match="groups of 32 do not divide the 16 inputs of the down"):
        RoundToNearest(group=32).transform(weights, OUTCOME, measured(weights))
