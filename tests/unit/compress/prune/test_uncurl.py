"""UNCURL against the numbers of its worked example and the identities of a merge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moekit.anatomy import Geometry, find_moe_layers
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.prune.uncurl import UNCURL
from moekit.compress.weights import LayerWeights, from_live, outputs, to_live
from moekit.errors import BadConfig, NumericFault
from moekit.trace import record
from moekit.trace.statistics import LayerStatistics
from tests.families import FAMILIES, build, tokens

# 6 tokens x 4 experts; each token takes its best, ties to the lower number.
LOGITS = torch.tensor(
    [[4, 3, 0, -1], [3, 4, -1, 0], [5, 5, 1, 0], [0, -1, 4, 4], [-1, 0, 3, 5], [0, 1, 5, 3]], dtype=torch.float64
)
LOAD = torch.tensor([2, 1, 2, 1])


def inputs(logits: Tensor, load: Tensor, protected: set[int] | None = None, seed: int = 0) -> LayerInputs:
    experts = logits.shape[1]
    values = {"logit_gram": logits.T @ logits, "logit_sum": logits.sum(0), "load": load}
    statistics = LayerStatistics(experts, 8, tokens=len(logits), values=values)
    geometry = Geometry(8, experts, 1, 8, 0, True, False, False, True)
    return LayerInputs(3, geometry, statistics, seed=seed, protected=frozenset(protected or ()))


def decide(method: UNCURL, seen: LayerInputs, keep: int) -> LayerOutcome:
    outcome = method.decide(seen, method.score(seen), keep)
    assert len(outcome.keep) == keep
    return outcome


def layer(experts: int, seed: int = 0) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up_EIH": (experts, 6, 8), "down_EHI": (experts, 8, 6), "gate_EIH": (experts, 6, 8)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return LayerWeights(**tensors, router={"weight": torch.randn(experts, 8, generator=generator)})


def random_case(experts: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, experts, generator=generator, dtype=torch.float64)
    return logits, torch.bincount(logits.argmax(1), minlength=experts)


def test_four_experts_by_hand() -> None:
    assert torch.equal(torch.bincount(LOGITS.argmax(1), minlength=4), LOAD)
    outcome = decide(UNCURL(), inputs(LOGITS, LOAD), 2)
    assert outcome.keep == (0, 2)
    assert outcome.sources == ((0, 1), (2, 3))
    assert outcome.shares == (pytest.approx((2 / 3, 1 / 3)), pytest.approx((2 / 3, 1 / 3)))
    assert outcome.figures["largest_group"] == 2
    assert outcome.figures["similarity_within_groups"] == pytest.approx((0.9515012 + 0.8932460) / 2, abs=1e-7)


@pytest.mark.parametrize("affinity", ["cosine", "pearson", "rbf"])
def test_every_affinity_finds_the_two_pairs(affinity: str) -> None:
    assert decide(UNCURL(affinity=affinity), inputs(LOGITS, LOAD), 2).sources == ((0, 1), (2, 3))


def test_the_most_used_is_the_representative() -> None:
    outcome = decide(UNCURL(), inputs(LOGITS, torch.tensor([1, 5, 2, 2])), 2)
    assert outcome.keep == (1, 2)
    assert outcome.sources == ((0, 1), (2, 3))
    assert outcome.shares == (pytest.approx((1 / 6, 5 / 6)), pytest.approx((0.5, 0.5)))


def test_the_score_is_the_load() -> None:
    assert UNCURL().score(inputs(LOGITS, LOAD)).tolist() == [2.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("method", UNCURL.examples(Geometry(8, 4, 1, 6, 0, True, False, False, True)), ids=repr)
def test_keeping_all_copies_the_layer_bit_for_bit(method: UNCURL) -> None:
    seen, weights = inputs(LOGITS, LOAD), layer(4)
    outcome = decide(method, seen, 4)
    assert outcome.sources == ((0,), (1,), (2,), (3,))
    kept = method.transform(weights, outcome, seen)
    for e in range(4):
        assert all(torch.equal(a, b) for a, b in zip(kept.expert(e), weights.expert(e), strict=True))
    assert torch.equal(kept.router_EH, weights.router_EH)


@pytest.mark.parametrize("keep", [1, 3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_groups_hold_every_expert_once_and_do_not_depend_on_numbers_or_scale(keep: int, seed: int) -> None:
    logits, load = random_case(9, seed)
    outcome = decide(UNCURL(), inputs(logits, load), keep)
    assert outcome.sources is not None
    assert outcome.shares is not None
    assert sorted(e for group in outcome.sources for e in group) == list(range(9))
    assert all(sum(share) == pytest.approx(1) for share in outcome.shares)
    for kept, group in zip(outcome.keep, outcome.sources, strict=True):
        assert load[kept] == max(load[e] for e in group)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    moved = decide(UNCURL(), inputs(logits[:, order], load[order]), keep)
    assert {frozenset(order[list(g)].tolist()) for g in moved.sources or ()} == {frozenset(g) for g in outcome.sources}
    assert decide(UNCURL(), inputs(logits * 31.7, load), keep).sources == outcome.sources


def test_a_merge_by_hand() -> None:
    seen, weights = inputs(LOGITS, LOAD), layer(4)
    method = UNCURL(align=False)
    merged = method.transform(weights, decide(method, seen, 2), seen)
    assert weights.gate_EIH is not None
    assert merged.gate_EIH is not None
    for got, all_experts in ((merged.up_EIH, weights.up_EIH), (merged.gate_EIH, weights.gate_EIH)):
        torch.testing.assert_close(got[1], (2 * all_experts[2] + all_experts[3]) / 3)
    torch.testing.assert_close(merged.router_EH[0], (2 * weights.router_EH[0] + weights.router_EH[1]) / 3)
    plain = replace(merged, router={})
    again = UNCURL(align=False, router="representative").transform(weights, decide(method, seen, 2), seen)
    assert torch.equal(again.router_EH, weights.router_EH[[0, 2]])
    assert all(torch.equal(a, b) for a, b in zip(again.expert(0), plain.expert(0), strict=True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shuffled_copies_merge_to_the_expert_itself_in_every_family(family: str) -> None:
    model = build(family)
    trace = record(model, [tokens()], statistics=UNCURL().required)
    assert trace.statistics is not None
    block = find_moe_layers(model)[0]
    experts = {n: p.detach() for n, p in block.experts._parameters.items() if p is not None}
    rows = {"weight": torch.randn(8, 32, generator=torch.Generator().manual_seed(0))}
    weights = from_live(experts, rows, block.geometry).map(torch.clone)
    first = weights.map(lambda t: t[:1].expand_as(t).clone(), router=False)
    for e in range(1, 8):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(e))
        for tensor in (first.up_EIH, first.gate_EIH, first.up_bias_EI, first.gate_bias_EI):
            if tensor is not None:
                tensor[e] = tensor[e][order]
        first.down_EHI[e] = first.down_EHI[e][:, order]
    seen = LayerInputs(block.index, block.geometry, trace.statistics[block.index])
    outcome = decide(UNCURL(), seen, 3)
    assert outcome.merges
    merged = UNCURL().transform(first, outcome, seen)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    for e in range(3):
        torch.testing.assert_close(
            outputs(merged, e, x, torch.nn.functional.silu),
            outputs(first, 0, x, torch.nn.functional.silu),
            atol=1e-5,
            rtol=1e-5,
        )
    live = to_live(merged, block.geometry)
    assert {n: t.shape[1:] for n, t in live.items()} == {n: t.shape[1:] for n, t in experts.items()}


def test_protected_experts_are_alone_and_copied_bit_for_bit() -> None:
    seen, weights = inputs(LOGITS, LOAD, protected={1}), layer(4)
    outcome = decide(UNCURL(), seen, 2)
    assert outcome.sources == ((0, 2, 3), (1,)) or outcome.sources == ((1,), (0, 2, 3))
    merged = UNCURL().transform(weights, outcome, seen)
    at = outcome.keep.index(1)
    assert all(torch.equal(a, b) for a, b in zip(merged.expert(at), weights.expert(1), strict=True))
    assert torch.equal(merged.router_EH[at], weights.router_EH[1])


def test_where_protected_experts_fill_the_budget_the_others_are_dropped() -> None:
    outcome = decide(UNCURL(), inputs(LOGITS, LOAD, protected={1, 3}), 2)
    assert outcome.sources == ((1,), (3,))
    with pytest.raises(BadConfig, match="2 experts are protected, but only 1 may stay") as caught:
        decide(UNCURL(), inputs(LOGITS, LOAD, protected={1, 3}), 1)
    assert "layer 3" in str(caught.value)


def test_experts_that_no_token_chose_take_no_cluster() -> None:
    # Two dead experts are like each other and like no other: clustered with the rest they would fill a slot.
    dead = torch.tensor([-5.0, -4.0, -5.0, -3.0, -5.0, -4.0], dtype=torch.float64)
    logits = torch.cat([LOGITS, dead[:, None], dead.flip(0)[:, None]], dim=1)
    load = torch.tensor([2, 1, 2, 1, 0, 0])
    outcome = decide(UNCURL(), inputs(logits, load), 2)
    assert outcome.sources is not None
    assert outcome.shares is not None
    assert [{0, 1}, {2, 3}] == [set(g) & {0, 1, 2, 3} for g in outcome.sources]
    assert sorted(e for g in outcome.sources for e in g) == list(range(6))
    shares = {
        e: s for g, share in zip(outcome.sources, outcome.shares, strict=True) for e, s in zip(g, share, strict=True)
    }
    assert shares[4] == shares[5] == 0
    assert shares[0] == pytest.approx(2 / 3)


def test_fewer_chosen_experts_than_slots() -> None:
    logits, _ = random_case(6, 0)
    outcome = decide(UNCURL(), inputs(logits, torch.tensor([0, 3, 0, 0, 9, 0])), 4)
    assert outcome.sources is not None
    assert (1,) in outcome.sources
    assert (4,) in outcome.sources
    rest = [g for g in outcome.sources if g not in ((1,), (4,))]
    assert sorted(e for g in rest for e in g) == [0, 2, 3, 5]
    assert all(share == pytest.approx([1 / len(share)] * len(share)) for share in outcome.shares or ())


def test_without_any_tokens_nothing_is_nan() -> None:
    seen, weights = inputs(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)), layer(4)
    for method in UNCURL.examples(seen.geometry):
        assert isinstance(method, UNCURL)
        outcome = decide(method, seen, 2)
        merged = method.transform(weights, outcome, seen)
        assert all(bool(t.isfinite().all()) for e in range(2) for t in merged.expert(e))


def test_damaged_statistics_are_named() -> None:
    logits = LOGITS.clone()
    logits[0, 2] = float("nan")
    with pytest.raises(NumericFault) as caught:
        decide(UNCURL(), inputs(logits, LOAD), 2)
    assert "layer 3, expert 2" in str(caught.value)


def test_the_same_seed_decides_the_same() -> None:
    logits, load = random_case(12, 1)
    found = {decide(UNCURL(restarts=1), inputs(logits, load, seed=4), 5).sources for _ in range(3)}
    assert len(found) == 1
