"""Wanda against the worked example, and against the rule applied to the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from moekit.anatomy import Geometry
from moekit.compress.engine.input_norms import input_norms
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.sparsify.magnitude import Magnitude
from moekit.compress.sparsify.wanda import Wanda
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import resolve

EXPERTS, HIDDEN, WIDTH, TOKENS = 4, 12, 8, 40


def evidence_of(stats: LayerStatistics, top_k: int = 2) -> LayerInputs:
    geometry = Geometry(stats.hidden, stats.experts, top_k, stats.width, 0, True, False, False, True)
    return LayerInputs(2, geometry, stats)


def given(**values: object) -> LayerInputs:
    tensors = {name: torch.as_tensor(value) for name, value in values.items()}
    experts, hidden = tensors["input_square"].shape
    return evidence_of(LayerStatistics(experts, hidden, values=tensors, width=tensors["inner_square"].shape[1]))


W = torch.tensor([[[-3.0, 1.0, 2.0], [4.0, 0.5, -1.0]]])


def test_worked_example() -> None:
    # Norms 1, 8, 2 of one token: scores 3, 8, 4 and 4, 4, 2. Magnitude would have removed the .5.
    weights = LayerWeights(up_EIH=W, down_EHI=torch.ones(1, 3, 2))
    seen = given(load=[1], input_square=[[1.0, 64.0, 4.0]], inner_square=[[1.0, 1.0]])
    assert input_norms(seen, "up", 0).tolist() == [1, 8, 2]  # type: ignore[union-attr]
    assert Wanda().zeros(weights, seen, 1 / 3).up_EIH.tolist() == [[[0, 1, 2], [4, 0.5, 0]]]
    assert Magnitude(per="row").zeros(weights, seen, 1 / 3).up_EIH.tolist() == [[[-3, 0, 2], [4, 0, -1]]]


def test_of_equal_scores_the_higher_column_stays() -> None:
    # The second row's first two scores are both 4: at 2/3 the third goes, and of the two the first.
    weights = LayerWeights(up_EIH=W, down_EHI=torch.ones(1, 3, 2))
    seen = given(load=[1], input_square=[[1.0, 64.0, 4.0]], inner_square=[[1.0, 1.0]])
    assert Wanda().zeros(weights, seen, 2 / 3).up_EIH[0, 1].tolist() == [0, 0.5, 0]


@pytest.mark.parametrize("norm", [1.0, 0.1, 3e4, 7e-9])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_equal_norms_are_magnitude_row_by_row(norm: float, pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = LayerWeights(
        up_EIH=torch.randn(2, 16, 64, generator=generator),
        down_EHI=torch.randn(2, 64, 16, generator=generator),
        gate_EIH=torch.randn(2, 16, 64, generator=generator).bfloat16(),
    )
    seen = given(load=[3, 5], input_square=torch.full((2, 64), norm), inner_square=torch.full((2, 16), norm))
    wanda = Wanda(pattern=pattern).zeros(weights, seen, 0.5)
    plain = Magnitude(per="row", pattern=pattern).zeros(weights, seen, 0.5)
    for name in ("up_EIH", "down_EHI", "gate_EIH"):
        assert torch.equal(getattr(wanda, name), getattr(plain, name))


def sample(seed: int = 0) -> tuple[LayerWeights, TokenBatch, torch.Tensor, torch.Tensor]:
    """A layer and tokens with what its experts see and make of it; expert 3 is never chosen."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = LayerWeights(
        up_EIH=draw(EXPERTS, WIDTH, HIDDEN),
        down_EHI=draw(EXPERTS, HIDDEN, WIDTH),
        gate_EIH=draw(EXPERTS, WIDTH, HIDDEN),
    )
    hidden_NH = draw(TOKENS, HIDDEN) * torch.arange(1.0, HIDDEN + 1)
    indices_NK = torch.rand(TOKENS, 3, generator=generator).argsort(-1)[:, :2]
    gates_NK = torch.rand(TOKENS, 2, generator=generator)
    assert weights.gate_EIH is not None
    gate_NKI = torch.einsum("nh,nkih->nki", hidden_NH, weights.gate_EIH[indices_NK])
    inner_NKI = torch.nn.functional.silu(gate_NKI) * torch.einsum("nh,nkih->nki", hidden_NH, weights.up_EIH[indices_NK])
    seen = TokenBatch(EXPERTS, indices_NK, weights=gates_NK, hidden=hidden_NH, inner=inner_NKI)
    return weights, seen, hidden_NH, inner_NKI


def measured(method: Wanda, seen: TokenBatch) -> LayerInputs:
    stats = LayerStatistics.empty(resolve(method.required), EXPERTS, HIDDEN, ("a",), width=WIDTH)
    stats.update(seen)
    return evidence_of(stats)


def reference(matrix: torch.Tensor, inputs: torch.Tensor, ratio: float) -> torch.Tensor:
    """The rule on the inputs themselves, row by row, in fp64."""
    result = matrix.clone()
    norms = inputs.double().norm(dim=0)
    for row in range(len(matrix)):
        scores = [(float(abs(w.double()) * norms[column]), column) for column, w in enumerate(matrix[row])]
        for _, column in sorted(scores)[: int(ratio * len(scores) + 1e-9)]:
            result[row, column] = 0.0
    return result


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_each_expert_is_judged_on_its_own_tokens(gated: bool, ratio: float) -> None:
    weights, seen, hidden_NH, inner_NKI = sample()
    method = Wanda(gated=gated)
    inputs = measured(method, seen)
    sparse = method.zeros(weights, inputs, ratio)
    for expert in range(3):
        tokens, slots = (seen.indices_NK == expert).nonzero(as_tuple=True)
        factor = seen.weights_NK[tokens, slots, None] if gated else torch.ones(len(tokens), 1)
        for name, inputs in (
            ("gate_EIH", hidden_NH[tokens]),
            ("up_EIH", hidden_NH[tokens]),
            ("down_EHI", inner_NKI[tokens, slots]),
        ):
            expected = reference(getattr(weights, name)[expert], inputs * factor, ratio)
            assert torch.equal(getattr(sparse, name)[expert], expected), (name, expert)


def test_gates_matter() -> None:
    weights, seen, _, _ = sample()
    plain, gated = (m.zeros(weights, measured(m, seen), 0.5).up_EIH for m in (Wanda(), Wanda(gated=True)))
    assert not torch.equal(plain, gated)


def test_an_expert_without_tokens_goes_by_magnitude_and_is_told() -> None:
    weights, seen, _, _ = sample()
    inputs = measured(Wanda(), seen)
    sparse = Wanda().zeros(weights, inputs, 0.5)
    plain = Magnitude(per="row").zeros(weights, inputs, 0.5)
    for name in ("gate_EIH", "up_EIH", "down_EHI"):
        assert torch.equal(getattr(sparse, name)[3], getattr(plain, name)[3])
    assert Wanda().figures(inputs) == {"by_magnitude": [3.0]}


def test_channels_that_are_always_zero_go_first() -> None:
    weights = LayerWeights(up_EIH=torch.tensor([[[9.0, 1.0, 2.0, 3.0]]]), down_EHI=torch.ones(1, 4, 1))
    seen = given(load=[2], input_square=[[0.0, 1.0, 1.0, 1.0]], inner_square=[[0.0]])
    assert Wanda().zeros(weights, seen, 0.5).up_EIH.tolist() == [[[0, 0, 2, 3]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_named(bad: float) -> None:
    weights = LayerWeights(up_EIH=W, down_EHI=torch.ones(1, 3, 2))
    seen = given(load=[1], input_square=[[1.0, bad, 4.0]], inner_square=[[1.0, 1.0]])
    with pytest.raises(NumericFault) as fault:
        Wanda().zeros(weights, seen, 1 / 3)
    assert (fault.value.layer, fault.value.expert) == (2, 0)
