"""Magnitude pruning, and what holds for every method that zeroes weights."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moekit import catalogue
from moekit.anatomy import Geometry, find_moe_layers
from moekit.compress.budget.sparsity import count_zeros
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.zeroing import SparsifyMethod
from moekit.compress.sparsify.magnitude import Magnitude
from moekit.compress.sparsify.owl import OWL
from moekit.compress.sparsify.wanda import Wanda
from moekit.compress.weights import LayerWeights, from_live
from moekit.errors import BadConfig, NumericFault
from moekit.trace.statistics import LayerStatistics
from tests.families import FAMILIES, build

METHODS: list[SparsifyMethod] = [
    Magnitude(),
    Magnitude(per="row"),
    Magnitude(pattern="2:4"),
    Wanda(),
    Wanda(pattern="2:4"),
    Wanda(pattern="4:8"),
    Wanda(gated=True),
    OWL(),
    OWL(score="magnitude"),
]


def layer(experts: int = 3, width: int = 8, hidden: int = 16, *, gate: bool = True) -> LayerWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return LayerWeights(
        up_EIH=draw(experts, width, hidden),
        down_EHI=draw(experts, hidden, width),
        gate_EIH=draw(experts, width, hidden) if gate else None,
        up_bias_EI=draw(experts, width),
        down_bias_EH=draw(experts, hidden),
        router={"weight": draw(experts, hidden)},
    )


def inputs(weights: LayerWeights, number: int = 4) -> LayerInputs:
    generator = torch.Generator().manual_seed(1)
    experts, hidden, width = weights.experts, weights.hidden, weights.width
    values = {
        "load": torch.arange(experts) + 1,
        "input_square": torch.rand(experts, hidden, generator=generator),
        "inner_square": torch.rand(experts, width, generator=generator),
    }
    values |= {f"gated_{name}": values[name] / 3 for name in ("input_square", "inner_square")}
    stats = LayerStatistics(experts, hidden, values=values, width=width)
    geometry = Geometry(hidden, experts, 2, width, 0, weights.gate_EIH is not None, False, False, True)
    return LayerInputs(number, geometry, stats, lambda: weights)


def matrices(weights: LayerWeights) -> list[torch.Tensor]:
    return [t for t in (weights.gate_EIH, weights.up_EIH, weights.down_EHI) if t is not None]


def test_smallest_of_a_matrix_by_hand() -> None:
    weights = LayerWeights(
        up_EIH=torch.tensor([[[-3.0, 1.0, 2.0], [4.0, 0.5, -1.5]]]), down_EHI=torch.tensor([[[1.0, 2.0]] * 3])
    )
    seen = inputs(weights)
    assert Magnitude().zeros(weights, seen, 1 / 3).up_EIH.tolist() == [[[-3, 0, 2], [4, 0, -1.5]]]
    assert Magnitude().zeros(weights, seen, 0.5).up_EIH.tolist() == [[[-3, 0, 2], [4, 0, 0]]]
    assert Magnitude(per="row").zeros(weights, seen, 2 / 3).up_EIH.tolist() == [[[-3, 0, 0], [4, 0, 0]]]


@pytest.mark.parametrize(
    ("sparsity", "kurtosis"), [(0.0, 3.0), (0.25, 2.2877), (0.5, 1.7283), (0.65, 1.4752), (0.8, 1.2732)]
)
def test_kurtosis_of_what_survives_of_a_gaussian(sparsity: float, kurtosis: float) -> None:
    drawn = torch.randn(1, 1000, 1000, generator=torch.Generator().manual_seed(3))
    weights = LayerWeights(up_EIH=drawn, down_EHI=torch.ones(1, 1000, 1000))
    left = Magnitude().zeros(weights, inputs(weights), sparsity).up_EIH.double()
    left = left[left != 0]
    centred = left - left.mean()
    # The sample kurtosis of a million Gaussian numbers strays by sqrt(24 / 1e6) = .005; three of these are allowed.
    assert float((centred**4).mean() / (centred**2).mean() ** 2) == pytest.approx(kurtosis, abs=0.015)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_zeros_are_counted_and_nothing_else_changes(method: SparsifyMethod) -> None:
    weights = layer()
    before = weights.map(torch.clone)
    sparse = method.zeros(weights, inputs(weights), 0.5)
    assert count_zeros(sparse).sparsity == 0.5
    for changed, original, untouched in zip(matrices(sparse), matrices(before), matrices(weights), strict=True):
        assert torch.equal(original, untouched)
        assert torch.equal(changed, torch.where(changed == 0, 0.0, original))
    assert torch.equal(sparse.router["weight"], before.router["weight"])
    for name in ("up_bias_EI", "down_bias_EH"):
        assert torch.equal(getattr(sparse, name), getattr(before, name))


@pytest.mark.parametrize("method", [m for m in METHODS if m.fixed_sparsity is None], ids=repr)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.62, 0.9])
def test_sparsity_is_met_within_one_weight_a_row(method: SparsifyMethod, sparsity: float) -> None:
    weights = layer()
    sparse = method.zeros(weights, inputs(weights), sparsity)
    for matrix in matrices(sparse):
        found = float((matrix == 0).double().mean())
        assert sparsity - 1 / matrix.shape[-1] < found <= sparsity + 1e-12
    if sparsity == 0:
        assert all(torch.equal(a, b) for a, b in zip(matrices(sparse), matrices(weights), strict=True))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_experts_without_a_gate(method: SparsifyMethod) -> None:
    weights = layer(gate=False)
    sparse = method.zeros(weights, inputs(weights), 0.5)
    assert sparse.gate_EIH is None
    assert count_zeros(sparse).sparsity == 0.5


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_impossible_sparsities(method: SparsifyMethod) -> None:
    weights = layer()
    seen = inputs(weights)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(BadConfig, match="sparsity"):
            method.zeros(weights, seen, wrong)
        with pytest.raises(BadConfig, match="sparsity"):
            method.share({4: seen}, wrong)
    if method.fixed_sparsity is not None:
        with pytest.raises(BadConfig, match=r"exactly 0\.5") as caught:
            method.zeros(weights, seen, 0.4)
        assert caught.value.layer == 4


def test_sharing_is_uniform_by_default() -> None:
    seen = inputs(layer())
    assert Magnitude().share({1: seen, 5: seen}, 0.4) == {1: 0.4, 5: 0.4}
    assert Wanda(pattern="2:4").share({1: seen}, 0.5) == {1: 0.5}


def test_a_pattern_that_does_not_fit_names_the_layer() -> None:
    weights = layer(width=6)
    with pytest.raises(BadConfig, match="6 inputs do not divide") as caught:
        Wanda(pattern="2:4").zeros(weights, inputs(weights), 0.5)
    assert caught.value.layer == 4
    with pytest.raises(ValidationError, match="no sparsity pattern"):
        Wanda(pattern="4:2")


def test_damaged_weights_are_named() -> None:
    weights = layer()
    weights.down_EHI[1, 2, 3] = float("inf")
    with pytest.raises(NumericFault, match="down projection") as caught:
        Wanda().zeros(weights, inputs(weights), 0.5)
    assert (caught.value.layer, caught.value.expert) == (4, 1)


def test_statistics_of_other_experts_are_refused() -> None:
    with pytest.raises(BadConfig, match="3 experts, statistics of 4"):
        Wanda().zeros(layer(3), inputs(layer(4)), 0.5)


def test_records() -> None:
    for name, method in (("magnitude", Magnitude), ("wanda", Wanda), ("owl", OWL)):
        record = catalogue.of(method)
        assert (record.kind, record.name, record.changes) == ("sparsify", name, "weights")
        assert method().required == record.needs
        assert method.examples(inputs(layer()).geometry)
    assert Magnitude().required == ()
    assert not Magnitude().sequential
    assert Wanda().sequential


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    block = find_moe_layers(build(family))[-1]
    experts = {n: p for n, p in block.experts.named_parameters(recurse=False) if p.dim() > 1}
    weights = from_live(experts, {}, block.geometry)  # views of live parameters, which ask for gradients
    for method in METHODS:
        sparse = method.zeros(weights, inputs(weights), 0.5)
        assert count_zeros(sparse).sparsity == 0.5
        assert not sparse.up_EIH.requires_grad
        assert count_zeros(weights).zeros == 0
