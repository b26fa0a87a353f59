"""M-SMoE against the numbers of its worked example and the identities of a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import make, of
from moekit.compress.budget.sizes import Budget, ByteSizes
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.merge.m_smoe import MSMoE
from moekit.compress.weights import LayerWeights, outputs
from moekit.errors import NumericFault
from moekit.trace.statistics import LayerStatistics

# Rows are experts, columns tokens. Cosines: (2, 0) .9941, (2, 1) .2783, (3, 0) .1386, (3, 1) .9703.
LOGITS_EN = torch.tensor([[2, 1, 0], [0, 1, 2], [1.9, 1.2, 0.1], [0.1, 0.5, 2.2]], dtype=torch.float64)
COUNTS = {0: (50, 30, 15, 5), 1: (26, 25, 25, 24)}


def inputs(
    load: Sequence[int],
    vectors_EN: Tensor = LOGITS_EN,
    *,
    number: int = 0,
    weights: LayerWeights | None = None,
    protected: Sequence[int] = (),
) -> LayerInputs:
    gram = vectors_EN @ vectors_EN.T
    values = {"load": torch.tensor(load), "logit_gram": gram, "all_output_gram": gram}
    experts = len(load)
    statistics = LayerStatistics(experts, 16, tokens=vectors_EN.shape[1], values=values)
    geometry = Geometry(16, experts, 1, 32, 0, True, False, False, True)
    read = None if weights is None else lambda: weights
    return LayerInputs(number, geometry, statistics, read, protected=frozenset(protected))


def layer(experts: int = 4, seed: int = 0) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return LayerWeights(
        draw(experts, 32, 16), draw(experts, 16, 32), draw(experts, 32, 16), router={"weight": draw(experts, 16)}
    )


def decide(method: MSMoE, seen: LayerInputs, keep: int) -> LayerOutcome:
    return method.decide(seen, method.score(seen), keep)


def test_groups_and_shares_by_hand() -> None:
    seen = inputs(COUNTS[0])
    method = MSMoE()
    assert method.score(seen).tolist() == [0.5, 0.3, 0.15, 0.05]
    alike = method.alike(seen)
    assert [alike[2, 0], alike[2, 1], alike[3, 0], alike[3, 1]] == pytest.approx(
        [0.9941, 0.2783, 0.1386, 0.9703], abs=5e-5
    )
    outcome = decide(method, seen, 2)
    assert outcome.keep == (0, 1)
    assert outcome.sources == ((0, 2), (1, 3))
    assert outcome.shares is not None
    assert outcome.shares[0] == pytest.approx((0.5 / 0.65, 0.15 / 0.65))
    assert outcome.shares[1] == pytest.approx((0.3 / 0.35, 0.05 / 0.35))
    assert outcome.figures["similarity_within_groups"] == pytest.approx((0.9941 + 0.9703) / 2, abs=5e-5)


def test_merged_weights_by_hand() -> None:
    seen, weights = inputs(COUNTS[0]), layer()
    method = MSMoE(align="none")
    merged = method.transform(weights, decide(method, seen, 2), seen)
    for before, after in ((weights.up_EIH, merged.up_EIH), (weights.down_EHI, merged.down_EHI)):
        torch.testing.assert_close(after[0], (0.5 * before[0] + 0.15 * before[2]) / 0.65)
        torch.testing.assert_close(after[1], (0.3 * before[1] + 0.05 * before[3]) / 0.35)
    assert torch.equal(merged.router_EH, weights.router_EH[:2])


def counts(loads: Mapping[int, Sequence[int]], total: float, least: int = 1) -> dict[int, int]:
    """Experts of each layer with the scope global."""
    seen = {number: inputs(load, number=number) for number, load in loads.items()}
    method = MSMoE()
    sizes = ByteSizes({n: len(load) for n, load in loads.items()}, 1, dict.fromkeys(loads, 1), 0)
    scores = {number: method.score(one) for number, one in seen.items()}
    return method.allocate(seen, scores, Budget(keep=total, scope="global", least=least), sizes)


def test_dominant_experts_of_all_layers_by_hand() -> None:
    # A = .5 .3 .15 .05 and .26 .25 .25 .24: forced .5 and .26, then .30 and the first .25. A strict threshold at the
    # fifth value, .25, would leave the second layer one expert alone.
    assert counts(COUNTS, 2) == {0: 2, 1: 2}
    # Two more: the other .25, then .24.
    assert counts(COUNTS, 3) == {0: 2, 1: 4}


def test_layers_of_even_use_keep_more_and_none_is_left_out() -> None:
    assert counts({0: (97, 1, 1, 1), 1: (25, 25, 25, 25)}, 2) == {0: 1, 1: 3}
    assert counts({0: (97, 1, 1, 1), 1: (25, 25, 25, 25)}, 2, least=2) == {0: 2, 1: 2}
    assert counts({0: (1, 1, 1, 1), 1: (9, 1, 0, 0)}, 2) == {0: 3, 1: 1}, "A counts, not tokens"


def test_of_equally_used_experts_the_lower_stay() -> None:
    assert decide(MSMoE(), inputs((5, 5, 5, 5)), 3).keep == (0, 1, 2)


def test_of_equally_similar_dominants_the_more_used_takes_in() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert decide(MSMoE(), inputs((3, 7, 1), vectors), 2).sources == ((0,), (1, 2))
    assert decide(MSMoE(), inputs((7, 3, 1), vectors), 2).sources == ((0, 2), (1,))


def test_who_was_never_chosen_joins_a_group_and_counts_for_nothing() -> None:
    seen, weights = inputs((50, 30, 0, 5)), layer()
    outcome = decide(MSMoE(), seen, 2)
    assert outcome.sources == ((0, 2), (1, 3))
    assert outcome.shares is not None
    assert outcome.shares[0] == (1.0, 0.0)
    merged = MSMoE().transform(weights, outcome, seen)
    assert all(torch.equal(a, b) for a, b in zip(merged.expert(0), weights.expert(0), strict=True))
    # A text without tokens: equal shares, nothing NaN.
    empty = decide(MSMoE(), inputs((0, 0, 0, 0), LOGITS_EN[:, :0]), 2)
    assert all(share == pytest.approx([1 / len(share)] * len(share)) for share in empty.shares or ())


@pytest.mark.parametrize("similarity", ["logits", "router", "outputs"])
def test_keeping_all_and_groups_of_one_are_copied_bit_for_bit(similarity: str) -> None:
    weights = layer()
    method = MSMoE(similarity=similarity)
    seen = inputs((1, 1, 1, 97), weights=weights)
    kept = method.transform(weights, decide(method, seen, 4), seen)
    assert all(torch.equal(a, b) for e in range(4) for a, b in zip(kept.expert(e), weights.expert(e), strict=True))
    outcome = decide(method, seen, 3)
    merged = method.transform(weights, outcome, seen)
    assert outcome.sources is not None
    for position, group in enumerate(outcome.sources):
        if len(group) == 1:
            pairs = zip(merged.expert(position), weights.expert(group[0]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_permuted_copies_merge_to_the_function_itself_if_they_are_aligned() -> None:
    first = layer(1)
    weights = first.map(lambda t: t.expand(4, *t.shape[1:]).clone())
    assert weights.gate_EIH is not None
    for e in range(1, 4):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(e))
        weights.up_EIH[e], weights.gate_EIH[e] = weights.up_EIH[e][order], weights.gate_EIH[e][order]
        weights.down_EHI[e] = weights.down_EHI[e][:, order]
    seen = inputs((4, 3, 2, 1))
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = outputs(first, 0, x, torch.nn.functional.silu)

    def error(align: str) -> float:
        method = MSMoE(align=align)
        merged = method.transform(weights, decide(method, seen, 1), seen)
        return float((outputs(merged, 0, x, torch.nn.functional.silu) - expected).norm() / expected.norm())

    assert error("weights") < 1e-12
    assert error("none") > 0.5


def test_each_similarity_looks_at_what_it_says() -> None:
    weights = layer()
    weights.router["weight"].copy_(torch.eye(4, 16, dtype=torch.float64))
    weights.router["weight"][2] = torch.eye(16, dtype=torch.float64)[1] * 3  # of another length, the same direction
    seen = inputs(COUNTS[0], weights=weights)
    assert decide(MSMoE(similarity="router"), seen, 2).sources == ((0, 3), (1, 2))
    assert of(MSMoE).needs == MSMoE().required == ("load", "logit_gram")
    assert MSMoE(similarity="router").required == ("load",)
    assert MSMoE(similarity="outputs").required == ("load", "all_output_gram")
    assert decide(MSMoE(similarity="outputs"), inputs(COUNTS[0]), 2).sources == ((0, 2), (1, 3))
    assert isinstance(make("merge", "m-smoe", {"similarity": "outputs"}), MSMoE)


@pytest.mark.parametrize("seed", range(3))
def test_groups_depend_neither_on_numbers_nor_on_the_scale_of_logits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    load = torch.randperm(90, generator=generator)[:9]
    groups = {frozenset(g) for g in decide(MSMoE(), inputs(load.tolist(), vectors), 4).sources or ()}
    order = torch.randperm(9, generator=generator)
    moved = decide(MSMoE(), inputs(load[order].tolist(), vectors[order] * 31.7), 4)
    assert {frozenset(order[list(g)].tolist()) for g in moved.sources or ()} == groups


def test_protected_experts_are_alone() -> None:
    assert decide(MSMoE(), inputs(COUNTS[0], protected=(3,)), 3).sources == ((0, 2), (1,), (3,))


@pytest.mark.parametrize("similarity", ["logits", "router"])
def test_damage_is_named(similarity: str) -> None:
    vectors, weights = LOGITS_EN.clone(), layer()
    vectors[2, 0] = weights.router["weight"][2, 5] = float("nan")
    with pytest.raises(NumericFault) as caught:
        decide(MSMoE(similarity=similarity), inputs(COUNTS[0], vectors, number=3, weights=weights), 2)
    assert "layer 3, expert 2" in str(caught.value)
