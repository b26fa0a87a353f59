"""DERN against its worked example and its laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu

from moekit import catalogue
from moekit.anatomy import Geometry, find_moe_layers
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.neurons.segments import Nearest, gather, nearest_targets, write_segments
from moekit.compress.prune.dern import DERN
from moekit.compress.weights import LayerWeights, from_live, outputs, to_live
from moekit.errors import NumericFault, UnsupportedModel
from moekit.trace import record
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import resolve
from tests.families import FAMILIES, build, tokens

# Router probabilities of 4 tokens over 3 experts, top-2 renormalised.
PROBABILITIES = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.1, 0.4], [0.45, 0.35, 0.2]])


def by_hand() -> LayerWeights:
    gate = [[[1.0, 0], [0, 1.5]], [[1, 1], [1, -1]], [[2, 0], [-1, 1]]]
    up = [[[1.0, 0], [0, 1]], [[0, 2], [1, 0]], [[1, 0.5], [-1, 0]]]
    down = [[[1.0, 0], [0, 1]], [[0, 1], [1, 1]], [[1, 0], [0, -1]]]
    router = {"weight": torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]])}
    return LayerWeights(torch.tensor(up), torch.tensor(down).transpose(1, 2).clone(), torch.tensor(gate), router=router)


def seen_by_hand() -> LayerInputs:
    chosen = PROBABILITIES.topk(2)
    observation = TokenBatch(3, chosen.indices, weights=chosen.values / chosen.values.sum(1, keepdim=True))
    found = LayerStatistics.empty(resolve(DERN().required), 3, 2)
    found.update(observation)
    return LayerInputs(3, Geometry(2, 3, 2, 2, 0, True, False, False, True), found)


def layer(
    experts: int = 5, width: int = 6, hidden: int = 8, *, gate: bool = True, bias: bool = False, seed: int = 0
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


def inputs(weights: LayerWeights, mass: list[float], protected: set[int] | None = None) -> LayerInputs:
    mass_E = torch.tensor(mass, dtype=torch.float64)
    values = {"gate_mass": mass_E, "load": (mass_E > 0).long() * 7, "gated_output_norm": mass_E * 3}
    statistics = LayerStatistics(weights.experts, weights.hidden, tokens=10, values=values)
    gate, bias = weights.gate_EIH is not None, weights.up_bias_EI is not None
    geometry = Geometry(weights.hidden, weights.experts, 2, weights.width, 0, gate, bias, False, True)
    return LayerInputs(3, geometry, statistics, protected=frozenset(protected or ()))


def permuted(weights: LayerWeights, source: int, target: int, seed: int = 0) -> LayerWeights:
    """The layer with expert `target` replaced by `source`, neurons in another order; router rows as they were."""
    changed = weights.map(torch.clone)
    order = torch.randperm(weights.width, generator=torch.Generator().manual_seed(seed))
    write_segments(changed, target, gather(weights, [(source, order)], balance=False))
    return changed


def run(method: DERN, weights: LayerWeights, seen: LayerInputs, keep: int) -> tuple[LayerWeights, LayerOutcome]:
    outcome = method.decide(seen, method.score(seen), keep)
    assert len(outcome.keep) == keep
    return method.transform(weights, outcome, seen), outcome


def assert_same(found: LayerWeights, expected: LayerWeights) -> None:
    for e in range(expected.experts):
        assert all(torch.equal(a, b) for a, b in zip(found.expert(e), expected.expert(e), strict=True))
    assert all(torch.equal(found.router[n], t) for n, t in expected.router.items())
    assert found.router.keys() == expected.router.keys()


def as_set(segments: Tensor) -> Tensor:
    """Segments in an order of their own."""
    return segments[segments[:, 0].argsort()]


X = torch.randn(9, 8, generator=torch.Generator().manual_seed(9))
KINDS = [{"gate": g, "bias": b} for g in (True, False) for b in (True, False)]


def test_importance_by_hand() -> None:
    seen = seen_by_hand()
    assert DERN().score(seen).tolist() == pytest.approx([0.5017361, 0.3871528, 0.1111111], abs=5e-8)
    assert DERN().decide(seen, DERN().score(seen), 2).keep == (0, 1)


@pytest.mark.parametrize("init", ["own", "gate"])
@pytest.mark.parametrize("compare", ["up_down", "all"])
@pytest.mark.parametrize(
    ("rescale", "gate", "up", "down"),
    [
        (False, [1.3071056, 0], [1.1536488, 0.0767284], [1.1536488, 0]),
        (True, [1.3221533, 0], [1.1669299, 0.0776117], [1.1669299, 0]),
    ],
)
def test_the_whole_method_by_hand(
    init: Any, compare: Any, rescale: bool, gate: list[float], up: list[float], down: list[float]
) -> None:
    weights, seen = by_hand(), seen_by_hand()
    method = DERN(init=init, compare=compare, rescale=rescale, router="add")
    result, outcome = run(method, weights, seen, 2)
    assert result.gate_EIH is not None
    assert result.gate_EIH[0, 0].tolist() == pytest.approx(gate, abs=2e-7)
    assert result.up_EIH[0, 0].tolist() == pytest.approx(up, abs=2e-7)
    assert result.down_EHI[0, :, 0].tolist() == pytest.approx(down, abs=2e-7)
    for e, i in ((0, 1), (1, 0), (1, 1)):  # a cluster of one segment, and an expert that receives nothing
        kept, old = (gather(w, [(e, torch.tensor([i]))], balance=False) for w in (result, weights))
        assert torch.equal(kept, old)
    assert result.router_EH.tolist() == [[1.25, 0.25], [0, 1]]
    figures = method.told(weights, outcome, seen)
    assert figures["moved_share"] == 0.5
    assert figures["receiving"] == 1
    assert figures["nothing_to_recombine"] == 0


@pytest.mark.parametrize("router", ["add", "mean", "none"])
def test_router_rows_by_hand(router: Any) -> None:
    row = {"add": [1.25, 0.25], "mean": [1.25 / 1.5, 0.25 / 1.5], "none": [1, 0]}[router]
    assert DERN().router == "none"
    result, _ = run(DERN(router=router), by_hand(), seen_by_hand(), 2)
    assert result.router_EH[0].tolist() == pytest.approx(row)
    assert result.router_EH[1].tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_keeping_all_changes_nothing(kind: dict[str, bool]) -> None:
    weights = layer(**kind)
    seen = inputs(weights, [3, 1, 4, 2, 5])
    for method in DERN.examples(seen.geometry):
        assert isinstance(method, DERN)
        result, _ = run(method, weights, seen, 5)
        assert_same(result, weights)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.01, 2.0])
def test_a_high_alpha_is_pruning_by_gate_mass(kind: dict[str, bool], alpha: float) -> None:
    weights = permuted(layer(**kind), 0, 1)
    seen = inputs(weights, [3, 1, 4, 2, 5])
    result, outcome = run(DERN(alpha=alpha, router="add"), weights, seen, 3)
    assert outcome.keep == (0, 2, 4)
    assert_same(result, weights.select([0, 2, 4]))
    figures = DERN(alpha=alpha).told(weights, outcome, seen)
    assert figures["moved_share"] == 0
    assert figures["nothing_to_recombine"] == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("compare", ["up_down", "all", "mean"])
def test_a_shuffled_copy_moves_home_as_a_whole(kind: dict[str, bool], compare: Any) -> None:
    weights = permuted(layer(**kind), 0, 1)
    weights.router["weight"][1], weights.router["bias"][1] = weights.router["weight"][0], weights.router["bias"][0]
    seen = inputs(weights, [3, 2.5, 4, 2, 5])
    for init in ("own", "random"):
        method = DERN(alpha=0.97, compare=compare, init=init, router="mean")
        result, outcome = run(method, weights, seen, 3)
        assert outcome.keep == (0, 2, 4)
        figures = method.told(weights, outcome, seen)
        assert figures["moved_share_most"] == 1  # expert 1
        assert figures["moved_share_least"] == 0  # expert 3, like nothing
        # Copies in the kept expert's cluster count once; where both copies of a neuron are random first centroids,
        # others are lost, so that only the expert's own ones promise it back.
        if init == "own":
            found, old = (gather(w, [(0, torch.arange(6))], balance=False) for w in (result, weights))
            torch.testing.assert_close(as_set(found), as_set(old), atol=1e-5, rtol=0)
            torch.testing.assert_close(outputs(result, 0, X, silu), outputs(weights, 0, X, silu), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.router_EH[0], weights.router_EH[0])
        torch.testing.assert_close(result.router["bias"][0], weights.router["bias"][0])
        assert_same(result.select([1, 2]), weights.select([2, 4]))
    own, _ = run(DERN(alpha=0.97, compare=compare), weights, seen, 3)
    assert torch.equal(own.router_EH, weights.router_EH[[0, 2, 4]])
    doubled, _ = run(DERN(alpha=0.97, compare=compare, router="add"), weights, seen, 3)
    torch.testing.assert_close(doubled.router_EH[0], 2 * weights.router_EH[0])
    torch.testing.assert_close(doubled.router["bias"][0], 2 * weights.router["bias"][0])


def same_neurons(found: LayerWeights, weights: LayerWeights, expert: int) -> int:
    """How many neurons of an expert the first of the result still has."""
    new, old = (gather(w, [(e, torch.arange(w.width))], balance=False) for w, e in ((found, 0), (weights, expert)))
    return int((cosine_similarity(old[:, None], new[None], dim=-1).amax(1) > 0.999).sum())


def test_among_duplicates_the_largest_gates_lose_neurons_and_own_segments_do_not() -> None:
    weights = layer(4, 24, 32)
    for e in (1, 2, 3):
        weights = permuted(weights, 0, e, seed=e)
    seen = inputs(weights, [9, 3, 2, 1])
    own, _ = run(DERN(init="own"), weights, seen, 1)
    gate, _ = run(DERN(init="gate"), weights, seen, 1)
    drawn, _ = run(DERN(init="random"), weights, seen, 1)
    assert same_neurons(own, weights, 0) == 24
    assert same_neurons(gate, weights, 0) <= 12
    assert same_neurons(drawn, weights, 0) < 24
    x_NH = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    expected_NH = outputs(weights, 0, x_NH, silu)
    torch.testing.assert_close(outputs(own, 0, x_NH, silu), expected_NH, atol=2e-4, rtol=1e-4)
    assert float((outputs(gate, 0, x_NH, silu) - expected_NH).norm()) > 0.3 * float(expected_NH.norm())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("init", ["own", "gate"])
def test_the_order_of_neurons_does_not_matter(kind: dict[str, bool], init: Any) -> None:
    weights = layer(width=10, **kind)
    shuffled = weights
    for e in range(5):
        shuffled = permuted(shuffled, e, e, seed=e)
    seen = inputs(weights, [3, 1, 4, 2, 5])
    method = DERN(alpha=0.1, init=init)
    first, outcome = run(method, weights, seen, 2)
    second, _ = run(method, shuffled, seen, 2)
    assert method.told(weights, outcome, seen)["moved_share"] > 0.5
    torch.testing.assert_close(first.router_EH, second.router_EH)
    for e in range(2):
        torch.testing.assert_close(outputs(first, e, X, silu), outputs(second, e, X, silu), atol=1e-4, rtol=1e-4)


def test_the_order_of_experts_does_not_matter() -> None:
    weights, mass = layer(6, 10), [3.0, 1, 4, 2, 5, 0.5]
    order = [4, 2, 0, 5, 3, 1]
    method = DERN(alpha=0.1)
    first, outcome = run(method, weights, inputs(weights, mass), 3)
    again, other = run(method, weights.select(order), inputs(weights, [mass[e] for e in order]), 3)
    names = [order[e] for e in other.keep]
    assert sorted(names) == list(outcome.keep)
    for at, name in enumerate(names):
        then = outcome.keep.index(name)
        torch.testing.assert_close(outputs(again, at, X, silu), outputs(first, then, X, silu), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.router_EH[at], first.router_EH[then])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_biases_travel_with_their_neuron_and_the_down_bias_stays(kind: dict[str, bool]) -> None:
    """One neuron an expert: the kept one is the weighted mean of both at their mean norm, biases included."""
    weights = layer(2, 1, 8, **kind)
    for name in ("up_EIH", "gate_EIH", "down_EHI", "up_bias_EI", "gate_bias_EI"):
        if (tensor := getattr(weights, name)) is not None:
            tensor[1] = tensor[0] * 1.5 + 0.1 * tensor[1]
    result, _ = run(DERN(rescale=False), weights, inputs(weights, [3, 1]), 1)
    first, second = (gather(weights, [(e, torch.arange(1))], balance=False)[0] for e in (0, 1))
    norm = (first.norm() + second.norm()) / 2
    expected = 0.75 * first / first.norm() * norm + 0.25 * second / second.norm() * norm
    torch.testing.assert_close(gather(result, [(0, torch.arange(1))], balance=False)[0], expected)
    if weights.down_bias_EH is not None:
        assert result.down_bias_EH is not None
        assert torch.equal(result.down_bias_EH[0], weights.down_bias_EH[0])


def test_weights_come_from_the_source() -> None:
    """The same copy counts more where its expert was used more."""
    weights = layer(2, 1)
    weights.up_EIH[1], weights.down_EHI[1] = weights.up_EIH[0] + 0.3, weights.down_EHI[0] + 0.3

    def nearness(mass: list[float], method: DERN) -> float:
        result, _ = run(method, weights, inputs(weights, mass), 1)
        one, other = (gather(w, [(e, torch.arange(1))], balance=False)[0] for w, e in ((result, 0), (weights, 1)))
        return float(cosine_similarity(one, other, dim=0))

    for method in (DERN(alpha=0), DERN(alpha=0, importance="reap")):
        assert nearness([9, 1], method) < nearness([9, 5], method) < nearness([9, 8.9], method)


def test_experts_that_no_token_chose_move_nothing() -> None:
    weights = permuted(permuted(layer(), 0, 1, seed=1), 0, 3, seed=3)
    seen = inputs(weights, [3, 1, 4, 0, 5])
    result, outcome = run(DERN(), weights, seen, 3)
    figures = DERN().told(weights, outcome, seen)
    assert figures["moved_share"] == 0.5
    assert figures["moved_share_least"] == 0
    without = inputs(weights.select([0, 1, 2, 4]), [3, 1, 4, 5])
    alone, _ = run(DERN(), weights.select([0, 1, 2, 4]), without, 3)
    assert_same(result, alone)


@pytest.mark.parametrize("mass", [[0.0, 0, 0, 0, 0], [0, 2, 0, 0, 0], [1, 2, 3, 0, 0]])
def test_few_or_no_chosen_experts_leave_finite_weights(mass: list[float]) -> None:
    weights = layer()
    seen = inputs(weights, mass)
    seen = replace(seen, statistics=LayerStatistics(5, 8, tokens=int(sum(mass)), values=dict(seen.statistics)))
    for method in (*DERN.examples(seen.geometry), DERN(alpha=-1.0)):
        assert isinstance(method, DERN)
        assert bool(method.score(seen).isfinite().all())
        result, _ = run(method, weights, seen, 4)
        assert all(bool(t.isfinite().all()) for e in range(4) for t in result.expert(e))
        assert bool(result.router_EH.isfinite().all())


def test_nothing_moves_into_protected_experts() -> None:
    weights = permuted(layer(), 0, 1)
    seen = inputs(weights, [3, 1, 4, 2, 5], protected={0})
    method = DERN(alpha=-1.0)
    result, outcome = run(method, weights, seen, 3)
    assert_same(result.select([0]), weights.select([0]))
    assert method.told(weights, outcome, seen)["receiving"] == 2
    everything = inputs(weights, [3, 1, 4, 2, 5], protected={0, 2, 4})
    result, outcome = run(method, weights, everything, 3)
    assert_same(result, weights.select([0, 2, 4]))
    assert method.told(weights, outcome, everything)["moved_share"] == 0


def test_balance_recombines_a_copy_in_another_scale() -> None:
    weights = permuted(layer(), 0, 1)
    weights.up_EIH[1] *= -4
    weights.down_EHI[1] /= -4
    seen = inputs(weights, [3, 2.5, 4, 2, 5])
    result, outcome = run(DERN(balance=True, alpha=0.9), weights, seen, 3)
    assert DERN(balance=True, alpha=0.9).told(weights, outcome, seen)["moved_share_most"] == 1
    assert DERN(alpha=0.9).told(weights, outcome, seen)["moved_share_most"] == 0
    torch.testing.assert_close(outputs(result, 0, X, silu), outputs(weights, 0, X, silu), atol=1e-4, rtol=1e-4)
    assert_same(result.select([1, 2]), weights.select([2, 4]))


@pytest.mark.parametrize("kind", KINDS[:1] + KINDS[2:], ids=str)
def test_balance_is_refused_where_it_would_change_what_experts_compute(kind: dict[str, bool]) -> None:
    weights = layer(**kind)
    seen = inputs(weights, [3, 1, 4, 2, 5])
    with pytest.raises(UnsupportedModel, match="cannot be rescaled") as caught:
        DERN(balance=True).decide(seen, DERN().score(seen), 3)
    assert caught.value.layer == 3
    with pytest.raises(UnsupportedModel, match="cannot be rescaled"):
        DERN(balance=True).transform(weights, LayerOutcome(keep=(0, 1)), seen)


def test_tensors_of_unknown_meaning_are_refused_only_where_something_may_move() -> None:
    weights = replace(layer(), others={"scales": torch.ones(5, 3)})
    seen = inputs(weights, [3, 1, 4, 2, 5])
    with pytest.raises(UnsupportedModel, match="scales") as caught:
        run(DERN(), weights, seen, 3)
    assert caught.value.layer == 3
    result, _ = run(DERN(), weights, seen, 5)
    assert_same(result, weights)


def test_damaged_weights_name_layer_and_expert() -> None:
    weights = layer()
    assert weights.gate_EIH is not None
    weights.gate_EIH[3, 0, 0] = float("nan")
    seen = inputs(weights, [3, 1, 4, 2, 5])
    with pytest.raises(NumericFault) as caught:
        run(DERN(), weights, seen, 3)
    assert (caught.value.layer, caught.value.expert) == (3, 3)


def test_figures_do_not_search_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(*args: Any, **kwargs: Any) -> Nearest:
        calls.append(kwargs)
        return nearest_targets(*args, **kwargs)

    monkeypatch.setattr("moekit.compress.prune.dern.nearest_targets", counted)
    weights = layer()
    seen = inputs(weights, [3, 1, 4, 2, 5])
    method = DERN(alpha=0.2)
    _, outcome = run(method, weights, seen, 3)
    method.told(weights, outcome, seen)
    DERN(alpha=0.4).told(weights, outcome, seen)
    assert len(calls) == 1
    DERN(compare="all").told(weights, outcome, seen)
    method.told(weights, LayerOutcome(keep=(0, 1)), seen)
    assert len(calls) == 3


def test_transform_leaves_its_input_alone_and_is_repeatable() -> None:
    weights = layer()
    before = weights.map(torch.clone)
    seen = inputs(weights, [3, 1, 4, 2, 5])
    for method in DERN.examples(seen.geometry):
        assert isinstance(method, DERN)
        first, _ = run(method, weights, seen, 2)
        assert_same(weights, before)
        again, _ = run(method, before.map(torch.clone), seen, 2)
        assert_same(again, first)


def test_what_it_needs() -> None:
    entry = catalogue.get("prune", "dern")
    assert entry.needs == ("gate_mass", "load")
    assert DERN().required == ("gate_mass", "load")
    assert DERN(importance="reap").required == ("gated_output_norm", "load")
    seen = inputs(layer(), [3, 1, 4, 0, 5])
    assert DERN().score(seen).tolist() == pytest.approx([0.3, 0.1, 0.4, 0, 0.5])
    assert DERN(importance="reap").score(seen).tolist() == pytest.approx([9 / 7, 3 / 7, 12 / 7, 0, 15 / 7])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shuffled_copies_give_the_expert_itself_in_every_family(family: str) -> None:
    model = build(family)
    trace = record(model, [tokens()], statistics=DERN().required)
    assert trace.statistics is not None
    block = find_moe_layers(model)[0]
    experts = {n: p.detach() for n, p in block.experts._parameters.items() if p is not None}
    rows = {"weight": torch.randn(8, 32, generator=torch.Generator().manual_seed(0))}
    weights = from_live(experts, rows, block.geometry).map(torch.clone)
    for e in range(1, 8):
        weights = permuted(weights, 0, e, seed=e)
    if weights.down_bias_EH is not None:
        weights.down_bias_EH[:] = weights.down_bias_EH[0].clone()
    seen = LayerInputs(block.index, block.geometry, trace.statistics[block.index])
    result, outcome = run(DERN(), weights, seen, 3)
    assert DERN().told(weights, outcome, seen)["moved_share"] > 0
    x_NH = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    for e in range(3):
        torch.testing.assert_close(
            outputs(result, e, x_NH, silu), outputs(weights, 0, x_NH, silu), atol=1e-5, rtol=1e-5
        )
    live = to_live(result, block.geometry)
    assert {n: t.shape[1:] for n, t in live.items()} == {n: t.shape[1:] for n, t in experts.items()}
    assert all(t.shape[0] == 3 for t in live.values())
