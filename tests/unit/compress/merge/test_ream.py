"""REAM: worked examples, and what must not change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import silu

from moekit.anatomy.probe import Geometry
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.neurons.align import PairedActivations, assigned, direction_distances, match_directions
from moekit.compress.merge.ream import REAM, gate_similarity, mean_similarity, token_similarity
from moekit.compress.weights import LayerWeights, outputs
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import get


def taken(seen: TokenBatch, *names: str) -> LayerStatistics:
    """Statistics of some tokens."""
    statistics = LayerStatistics.empty([get(name) for name in names], seen.experts, 2)
    statistics.update(seen)
    return statistics


def measured(seen: TokenBatch, method: REAM) -> LayerInputs:
    """A layer whose statistics are those of some tokens."""
    statistics = taken(seen, *method.required)
    return LayerInputs(4, Geometry(2, seen.experts, 1, 2, 0, True, False, False, True), statistics)


@pytest.mark.parametrize(("power", "scores"), [(1, (1.6, 1.5)), (2, (0.32, 0.75))])
def test_the_saliency_of_the_worked_example(power: int, scores: tuple[float, float]) -> None:
    norms = torch.tensor([[8.0, 3.0], [8.0, 3.0]])
    index, weights = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.2, 0.5], [0.2, 0.5]])
    seen = TokenBatch(2, index, weights=weights, norms=norms)
    method = REAM(gate_power=cast(Any, power), merge=False)
    assert method.score(measured(seen, method)).tolist() == pytest.approx(list(scores))


def test_the_gate_similarity_of_the_worked_example() -> None:
    logits_EN = torch.tensor([[2.0, 1, 0], [0, 3, 4], [2, 2, 1]])
    found = gate_similarity(logits_EN @ logits_EN.T)
    expected = torch.tensor([[1, 0, 0.620145], [0, 1, 0.325035], [0.620145, 0.325035, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert gate_similarity(torch.ones(3, 3)).tolist() == [[1.0] * 3] * 3
    nowhere = gate_similarity(torch.diag(torch.tensor([0.0, 0.0, 4.0])))
    assert (float(nowhere[0, 1]), float(nowhere[0, 2])) == (1.0, 0.0)


def test_the_output_similarities_of_the_worked_example() -> None:
    made_NEH = torch.tensor([[[1.0, 0], [1, 1]], [[0, 2], [0, -1]]])
    gates_NE = torch.tensor([[0.8, 0.1], [0.1, 0.7]])
    for factor_NE in (torch.ones(2, 2), gates_NE):
        seen = TokenBatch(2, torch.zeros(2, 1, dtype=torch.int64), all_outputs=made_NEH * factor_NE[..., None])
        cosine_EE = taken(seen, "all_output_cosine")["all_output_cosine"]
        assert float(token_similarity(cosine_EE, 2)[0, 1]) == pytest.approx(0.426777, abs=1e-6)
    ungated, gated = made_NEH.sum(0), (gates_NE[..., None] * made_NEH).sum(0)
    assert float(mean_similarity(ungated)[0, 1]) == pytest.approx(0.723607, abs=1e-6)
    assert float(mean_similarity(gated)[0, 1]) == pytest.approx(0.460127, abs=1e-6)


def test_mean_outputs_are_weighed_by_the_scores_of_all_experts() -> None:
    made_NEH = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    logits_NE = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for sigmoid, p_NE in ((False, logits_NE.softmax(-1)), (True, logits_NE.sigmoid())):
        index = torch.zeros(5, 1, dtype=torch.int64)
        seen = TokenBatch(3, index, logits=logits_NE, sigmoid=sigmoid, all_outputs=made_NEH)
        found = taken(seen, "scored_output_sum")["scored_output_sum"]
        expected = sum(p_NE[n, :, None] * made_NEH[n] for n in range(5))
        torch.testing.assert_close(found.float(), cast(Tensor, expected))


def stacked(*matrices: list[list[float]]) -> Tensor:
    return torch.tensor(matrices)


def worked() -> LayerWeights:
    return LayerWeights(
        gate_EIH=stacked([[1, 0], [0, 1]], [[0, 1.2], [1, 0.2]]),
        up_EIH=stacked([[1, 1], [1, -1]], [[1, -1], [1.2, 1]]),
        down_EHI=stacked([[1, 2], [0, 1]], [[2, 1], [1, 0.2]]),
        router={"gate.weight": torch.tensor([[1.0, 2], [3, 4]])},
    )


def of_two(align: str) -> LayerWeights:
    outcome = LayerOutcome(keep=(0,), sources=((0, 1),), shares=((0.75, 0.25),))
    inputs = LayerInputs(0, Geometry(2, 2, 1, 2, 0, True, False, False, True), LayerStatistics(2, 2))
    return REAM(align=cast(Any, align)).transform(worked(), outcome, inputs)


def test_the_merge_of_the_worked_example() -> None:
    neurons_EIF = worked().neurons_EIF()
    expected = torch.tensor([[1.145239, 0.156481], [0.064430, 1.065482]])
    torch.testing.assert_close(direction_distances(neurons_EIF[0], neurons_EIF[1]), expected, rtol=0, atol=1e-6)
    found = match_directions(neurons_EIF[0], neurons_EIF[1])
    assert found.order_I.tolist() == [1, 0]
    assert (found.cost, found.before) == (pytest.approx(0.220911, abs=2e-6), pytest.approx(2.210721, abs=2e-6))
    made = of_two("weights")
    assert made.gate_EIH is not None
    torch.testing.assert_close(made.gate_EIH[0], torch.tensor([[1, 0.05], [0, 1.05]]))
    torch.testing.assert_close(made.up_EIH[0], torch.tensor([[1.05, 1], [1, -1]]))
    torch.testing.assert_close(made.down_EHI[0], torch.tensor([[1, 2], [0.05, 1]]))
    assert made.router["gate.weight"].tolist() == [[1, 2]]
    x = torch.tensor([[1.0, 0.5]])
    given = [outputs(worked(), e, x, silu)[0] for e in (0, 1)]
    assert given[0].tolist() == pytest.approx([1.407818, 0.155615], abs=1e-6)
    assert given[1].tolist() == pytest.approx([1.790380, 0.474294], abs=1e-6)
    assert outputs(made, 0, x, silu)[0].tolist() == pytest.approx([1.499099, 0.223395], abs=1e-6)
    assert outputs(of_two("none"), 0, x, silu)[0].tolist() == pytest.approx([1.597652, 0.473271], abs=1e-6)


def test_large_neurons_count_no_more_than_small_ones() -> None:
    reference = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loud = reference[order] * torch.tensor([0.01, 5, 1, 30, 0.2, 2])[:, None]
    assert torch.equal(match_directions(reference, loud).order_I, order.argsort())


def layer(load: tuple[int, ...], norms: tuple[float, ...], protected: tuple[int, ...] = ()) -> LayerInputs:
    experts = len(load)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(40, experts, 3, generator=generator, dtype=torch.float64)
    unit = draw / draw.norm(dim=-1, keepdim=True)
    values = {
        "load": torch.tensor(load),
        "gated_output_norm": torch.tensor(norms, dtype=torch.float64),
        "logit_gram": draw[:, :, 0].T @ draw[:, :, 0],
        "all_output_cosine": torch.einsum("neh,nfh->ef", unit, unit),
    }
    statistics = LayerStatistics(experts, 3, (), 40, values)
    geometry = Geometry(3, experts, 1, 2, 0, True, False, False, True)
    return LayerInputs(5, geometry, statistics, protected=frozenset(protected))


def decided(method: REAM, inputs: LayerInputs, keep: int) -> LayerOutcome:
    return method.decide(inputs, method.score(inputs), keep)


LOAD, NORMS = (4, 10, 0, 3, 5, 2, 1, 8), (8.0, 5.0, 0.0, 9.0, 1.0, 3.0, 0.0, 7.0)


def test_groups_stand_on_the_most_salient_and_members_count_by_their_saliency() -> None:
    # Saliency 2, .5, -, 3, .2, 1.5, 0, .875.
    made = decided(REAM(group_size=4), layer(LOAD, NORMS), 4)
    assert made.keep == (0, 3, 5, 7)
    assert made.sources is not None
    assert made.shares is not None
    assert sorted(e for group in made.sources for e in group) == list(range(8))
    sizes = dict(zip(made.keep, map(len, made.sources), strict=True))
    assert sizes == {3: 4, 0: 2, 5: 1, 7: 1}
    worth = (2, 0.5, 0.2, 3, 0.2, 1.5, 0.2, 0.875)
    for group, share in zip(made.sources, made.shares, strict=True):
        total = sum(worth[e] for e in group)
        assert share == pytest.approx([worth[e] / total for e in group])
    with pytest.raises(BadConfig, match="4 groups of at most 1 experts"):
        decided(REAM(group_size=1), layer(LOAD, NORMS), 4)
    assert decided(REAM(group_size=1), layer(LOAD, NORMS), 8).unchanged(8)


def test_without_merging_it_is_pruning_by_the_same_saliency() -> None:
    for method in (REAM(), REAM(merge=False)):
        assert decided(method, layer(LOAD, NORMS), 4).keep == (0, 3, 5, 7)
    made = decided(REAM(merge=False), layer(LOAD, NORMS), 4)
    assert made.sources == ((0,), (3,), (5,), (7,))


def test_protected_experts_take_no_one_in() -> None:
    made = decided(REAM(), layer(LOAD, NORMS, protected=(4, 6)), 4)
    assert made.keep == (0, 3, 4, 6)
    assert made.sources is not None
    assert (4,) in made.sources
    assert (6,) in made.sources


@pytest.mark.parametrize("name", ["logit_gram", "all_output_cosine"])
def test_what_is_no_number_is_named(name: str) -> None:
    inputs = layer(LOAD, NORMS)
    inputs.statistics[name][3] = inputs.statistics[name][:, 3] = float("nan")
    with pytest.raises(NumericFault) as fault:
        decided(REAM(), inputs, 4)
    assert (fault.value.layer, fault.value.expert) == (5, 3)


def test_who_is_alone_is_bit_identical() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = LayerWeights(
        *(torch.randn(8, *s, generator=generator).bfloat16() for s in ((2, 3), (3, 2), (2, 3))),
        router={"gate.weight": torch.randn(8, 3, generator=generator)},
    )
    inputs = layer(LOAD, NORMS)
    made = decided(REAM(), inputs, 4)
    result = REAM().transform(weights, made, inputs)
    assert made.sources is not None
    for position, group in enumerate(made.sources):
        same = all(torch.equal(a, b) for a, b in zip(result.expert(position), weights.expert(group[0]), strict=True))
        assert same == (len(group) == 1)
    assert torch.equal(result.router["gate.weight"], weights.router["gate.weight"][[0, 3, 5, 7]])


@pytest.mark.parametrize("align", ["none", "weights"])
def test_copies_merge_into_themselves_and_the_order_of_neurons_changes_nothing(align: str) -> None:
    generator = torch.Generator().manual_seed(0)
    one = [torch.randn(1, *s, generator=generator) for s in ((4, 3), (3, 4), (4, 3))]
    weights = LayerWeights(*(t.repeat(8, 1, 1) for t in one), router={"gate.weight": torch.randn(8, 3)})
    inputs = layer(LOAD, NORMS)
    method = REAM(align=cast(Any, align))
    made = decided(method, inputs, 4)
    result = method.transform(weights, made, inputs)
    torch.testing.assert_close(result.up_EIH, weights.up_EIH[:4])
    if align == "weights":
        order = torch.tensor([2, 0, 3, 1])
        for stack in (weights.up_EIH, weights.gate_EIH):
            assert stack is not None
            stack[6] = stack[6][order]
        weights.down_EHI[6] = weights.down_EHI[6][:, order]
        torch.testing.assert_close(method.transform(weights, made, inputs).up_EIH, result.up_EIH)


def test_logits_that_nearly_agree_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    common_N1 = 8 + torch.randn(500, 1, generator=generator)
    logits_NE = common_N1 + torch.tensor([0.0, 1e-3, 0.1]) * torch.randn(500, 3, generator=generator)
    found = gate_similarity(
        taken(TokenBatch(3, torch.zeros(500, 1).long(), logits=logits_NE), "logit_gram")["logit_gram"]
    )
    unit_NE = logits_NE.double() / logits_NE.double().norm(dim=0)
    apart_EE = torch.stack([(unit_NE - unit_NE[:, [e]]).norm(dim=0) for e in range(3)])
    torch.testing.assert_close(found, 1 - apart_EE / apart_EE.max(), rtol=0, atol=1e-6)


def swiglu(x_NH: Tensor, gate_IH: Tensor, up_IH: Tensor) -> Tensor:
    return silu(x_NH @ gate_IH.T) * (x_NH @ up_IH.T)


def test_paired_activations_are_far_apart_by_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    first_NI, second_NI = (torch.randn(30, 5, generator=generator) for _ in range(2))
    first_NI[:, 2] = second_NI[:, 4] = 0
    seen = PairedActivations.empty(5, torch.empty(0, dtype=torch.float64))
    for rows in (slice(0, 11), slice(11, 30)):
        seen.add(first_NI[rows], second_NI[rows])
    for i, j in itertools.product(range(5), repeat=2):
        a, b = first_NI[:, i], second_NI[:, j]
        a, b = a / a.norm() if i != 2 else a, b / b.norm() if j != 4 else b
        assert float(seen.distance_II[i, j]) == pytest.approx(float((a - b).norm()), abs=1e-6)


def test_neurons_of_a_permuted_copy_are_found_again_by_what_they_give() -> None:
    """All of them on the same tokens; of other tokens for each expert, as the official code has it, next to none."""
    width, hidden = 64, 32
    generator = torch.Generator().manual_seed(0)
    gate_IH, up_IH = (torch.randn(width, hidden, generator=generator) for _ in range(2))
    order = torch.randperm(width, generator=generator)
    x_NH, other_NH = (torch.randn(512, hidden, generator=generator) for _ in range(2))

    def recovered(given_NH: Tensor) -> float:
        seen = PairedActivations.empty(width, torch.empty(0, dtype=torch.float64))
        seen.add(swiglu(x_NH, gate_IH, up_IH), swiglu(given_NH, gate_IH[order], up_IH[order]))
        return float((order[assigned(seen.distance_II).order_I] == torch.arange(width)).float().mean())

    assert recovered(x_NH) == 1
    assert recovered(other_NH) < 0.2


def two_experts(given_NH: Tensor) -> LayerInputs:
    """The worked example's layer while a text stands at it."""
    weights = worked()
    assert weights.gate_EIH is not None

    def inner(expert: int) -> Iterator[Tensor]:
        assert weights.gate_EIH is not None
        yield from swiglu(given_NH, weights.gate_EIH[expert], weights.up_EIH[expert]).split(7)

    geometry = Geometry(2, 2, 1, 2, 0, True, False, False, True)
    return LayerInputs(0, geometry, LayerStatistics(2, 2), read_inner=inner)


@pytest.mark.parametrize("align", ["both", "activations"])
def test_the_order_found_on_the_text_is_that_of_the_summed_distances(align: str) -> None:
    x_NH = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    inputs, weights = two_experts(x_NH), worked()
    outcome = LayerOutcome(keep=(0,), sources=((0, 1),), shares=((0.75, 0.25),))
    method = REAM(align=cast(Any, align))
    with pytest.raises(LookupError, match="while the text stands at the layer"):
        method.transform(weights, outcome, inputs)
    found = method.finds(weights, outcome, inputs)["neuron_order"]
    assert weights.gate_EIH is not None
    given = [swiglu(x_NH, weights.gate_EIH[e], weights.up_EIH[e]).T for e in (0, 1)]
    rows = [torch.cat([weights.gate_EIH[e], weights.up_EIH[e], weights.down_EHI[e].T], dim=1) for e in (0, 1)]
    unit = [[own / own.norm(dim=1, keepdim=True) for own in pair] for pair in (given, rows)]
    used = unit if align == "both" else unit[:1]
    cost = sum(torch.stack([(a[i] - b[j]).norm() for i in (0, 1) for j in (0, 1)]) for a, b in used)
    straight, crossed = float(cost[0] + cost[3]), float(cost[1] + cost[2])
    assert found.tolist() == [[0, 1], [1, 0] if crossed < straight else [0, 1]]
    inputs.statistics.keep({"neuron_order": found})
    assert method.match(weights, inputs)(0, 1).tolist() == found[1].tolist()  # type: ignore[misc]


def test_activations_that_are_no_number_and_experts_that_show_none_are_told() -> None:
    outcome = LayerOutcome(keep=(0,), sources=((0, 1),), shares=((0.75, 0.25),))
    with pytest.raises(NumericFault) as fault:
        REAM().finds(worked(), outcome, two_experts(torch.full((3, 2), float("inf"))))
    assert (fault.value.layer, fault.value.expert) == (0, 0)

    def shows_none(expert: int) -> Iterator[Tensor]:
        raise UnsupportedModel("they do not show it")

    inputs = dataclasses.replace(two_experts(torch.ones(3, 2)), read_inner=shows_none)
    assert REAM().finds(worked(), outcome, inputs) == {}
    with pytest.raises(UnsupportedModel, match="show it") as error:
        REAM(align="both").finds(worked(), outcome, inputs)
    assert "align=weights" in str(error.value.hint)


def test_a_layer_that_is_decided_on_the_model_as_it_is_has_no_activations() -> None:
    assert not REAM(mode="layerwise").reads_inner
    with pytest.raises(ValidationError, match="say mode progressive, or align weights"):
        REAM(mode="layerwise", align="both")
