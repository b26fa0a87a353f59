"""Dynamic skipping by hand, and its thresholds from calibration data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from moekit.anatomy import Gate, GateSpec, Geometry
from moekit.errors import BadConfig, BadData
from moekit.routing.methods.naee_skip import NAEESkip
from moekit.routing.second import skip_second
from moekit.runtime import PlanInputs
from moekit.runtime.router import Routed
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import resolve
from tests.routing import routed

# Renormalised weights of experts 0 and 1: 0.8 / 0.2, 0.6 / 0.4; of 2 and 1: 0.75 / 0.25.
SCORES_TE = torch.tensor([[0.8, 0.2, 1e-9], [0.6, 0.4, 1e-9], [1e-9, 0.25, 0.75]])
RATIOS = [0.25, 2 / 3, 1 / 3]


def geometry(experts: int = 3, top_k: int = 2) -> Geometry:
    return Geometry(8, experts, top_k, 8, 0, True, False, False, True)


def gate(**spec: object) -> Gate:
    return Gate(GateSpec(2, **({"normalise": True} | spec)), nn.Identity())  # type: ignore[arg-type]


def route(policy: NAEESkip, logits: torch.Tensor, tensors: dict[str, torch.Tensor] | None = None, **spec: object):
    prepared = policy.prepare(tensors or {}, geometry(logits.shape[1]))
    return routed(policy, gate(**spec), logits, prepared)


def counted(weights_TK: torch.Tensor, indices_TK: torch.Tensor, experts: int) -> LayerStatistics:
    stats = LayerStatistics.empty(resolve(["gate_ratio"]), experts, 8)
    stats.update(TokenBatch(experts, indices_TK, weights=weights_TK))
    return stats


@pytest.mark.parametrize(("beta", "skipped"), [(0.0, []), (0.3, [0]), (0.5, [0, 2]), (0.9, [0, 1, 2])])
def test_a_small_second_weight_is_skipped(beta: float, skipped: list[int]) -> None:
    weights, indices = route(NAEESkip(beta=beta), SCORES_TE.log())
    plain_weights, plain_indices = gate()(SCORES_TE.log())
    for row in range(3):
        if row in skipped:
            assert indices[row].tolist() == [int(plain_indices[row, 0]), 3]
            assert weights[row].tolist() == pytest.approx([1.0, 0.0])
        else:
            assert torch.equal(indices[row], plain_indices[row])
            assert torch.equal(weights[row], plain_weights[row])


def test_an_equal_weight_is_never_skipped() -> None:
    _, indices = route(NAEESkip(beta=1.0), torch.zeros(4, 3))
    assert bool((indices < 3).all())


def test_what_stays_weighs_as_the_familys_only_choice() -> None:
    logits = SCORES_TE.log()
    weights, _ = route(NAEESkip(beta=0.5), logits, scale=2.5)
    assert weights[0].tolist() == pytest.approx([2.5, 0.0])
    weights, _ = route(NAEESkip(beta=0.5), logits, scoring="selected_softmax", normalise=False)
    assert weights[0].tolist() == pytest.approx([1.0, 0.0])
    # Not renormalised: the weight it had.
    weights, _ = route(NAEESkip(beta=0.5), logits, normalise=False)
    assert weights[0].tolist() == pytest.approx([0.8, 0.0])


def test_the_smaller_weight_goes_wherever_it_stands() -> None:
    router = nn.Module()
    router.register_buffer("choice_bias", torch.tensor([0.0, 5.0, 0.0]))
    biased = Gate(GateSpec(2, normalise=True, bias="choice_bias"), router)
    weights, indices = routed(NAEESkip(beta=0.5), biased, SCORES_TE.log())
    assert biased(SCORES_TE.log())[1].tolist() == [[1, 0], [1, 0], [1, 2]]
    assert indices.tolist() == [[3, 0], [1, 0], [3, 2]]
    assert weights[0].tolist() == pytest.approx([0.0, 1.0])


def test_beta_is_the_median_of_the_ratios() -> None:
    weights, indices = gate()(SCORES_TE.log())
    stats = counted(weights, indices, 3)
    tensors = NAEESkip().plan(PlanInputs(0, geometry(), stats))
    assert tensors["beta"].shape == ()
    assert float(tensors["beta"]) == pytest.approx(sorted(RATIOS)[1], abs=1 / 512)
    moved = NAEESkip().permute(tensors, [2, 0, 1])
    assert torch.equal(moved["beta"], tensors["beta"])


def test_about_half_of_the_calibration_tokens_skip() -> None:
    logits = 2 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    weights, indices = gate()(logits)
    tensors = NAEESkip().plan(PlanInputs(0, geometry(8), counted(weights, indices, 8)))
    _, chosen = route(NAEESkip(), logits, tensors)
    assert float((chosen == 8).any(1).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_given_beta_needs_no_trace() -> None:
    assert NAEESkip(beta=0.4).plan(PlanInputs(0, geometry())) == {}
    # It also overrides what a plan holds, so that a plan can be tried with other thresholds.
    _, indices = route(NAEESkip(beta=0.0), SCORES_TE.log(), {"beta": torch.ones(())})
    assert bool((indices < 3).all())


def test_a_trace_without_ratios_says_what_to_do() -> None:
    with pytest.raises(BadData, match="no ratios") as caught:
        NAEESkip().plan(PlanInputs(5, geometry()))
    assert caught.value.layer == 5
    empty = LayerStatistics.empty(resolve(["gate_ratio"]), 3, 8)
    with pytest.raises(BadData, match="no token"):
        NAEESkip().plan(PlanInputs(5, geometry(), empty))


@pytest.mark.parametrize("top_k", [1, 4])
def test_other_than_two_choices_are_refused(top_k: int) -> None:
    with pytest.raises(BadConfig, match="second") as caught:
        NAEESkip(beta=0.5).check(geometry(8, top_k), layer=9)
    assert caught.value.layer == 9
    NAEESkip(beta=0.5).check(geometry(8, 2), layer=9)


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_beta_lies_between_0_and_1(beta: float) -> None:
    with pytest.raises(ValidationError):
        NAEESkip(beta=beta)


def test_gradients_reach_the_router() -> None:
    logits = SCORES_TE.log().requires_grad_()
    weights, _ = route(NAEESkip(beta=0.5), logits)
    (weights * torch.tensor([1.0, -2.0])).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[1] != 0).any())


def test_a_token_with_a_choice_of_nobody_stays_as_it_is() -> None:
    weights = torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.9, 0.1]])
    indices = torch.tensor([[1, 3], [3, 3], [2, 0]])
    inputs: Any = SimpleNamespace(layer=0, geometry=geometry(), gate=gate(), logits=torch.zeros(3, 3))
    found = skip_second(inputs, Routed(weights, indices), 0.5)
    assert torch.equal(found.weights, torch.tensor([[0.6, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    assert found.indices.tolist() == [[1, 3], [3, 3], [2, 3]]
