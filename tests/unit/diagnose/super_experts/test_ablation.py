"""Skipping experts against zeroed weights to the bit; attention sinks by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moekit.anatomy import find_moe_layers
from moekit.diagnose.super_experts.ablation import Pair, random_control, random_experts, without_experts
from moekit.diagnose.super_experts.attention_sinks import (
    attention_sink_decay,
    find_sinks,
    measure_sink_decay,
    sink_router_scores,
    sinks_mask,
)
from moekit.diagnose.super_experts.finding import SHARED
from moekit.errors import BadConfig, UnsupportedModel
from moekit.trace import record
from tests.families import EXPERTS, FAMILIES, HIDDEN, build, logits, tokens

EVERY = sorted(FAMILIES)


def busiest(family: str) -> list[Pair]:
    """Two much chosen experts of the first MoE layer, and one of the last."""
    statistics = record(build(family), [tokens()], statistics=("load",)).statistics
    assert statistics is not None
    first, last = min(statistics), max(statistics)
    best = {n: statistics[n].load_E.argsort(descending=True).tolist() for n in (first, last)}
    return [(first, best[first][0]), (first, best[first][1]), (last, best[last][0])]


@torch.no_grad()
def zeroed(family: str, pairs: list[Pair]) -> nn.Module:
    model = build(family)
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    for layer, expert in pairs:
        experts = layers[layer].experts
        experts.down_proj[expert] = 0  # type: ignore[index, operator]
        if layers[layer].geometry.has_bias:
            experts.down_proj_bias[expert] = 0  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", EVERY)
def test_skipping_is_zeroing_the_down_projection_to_the_bit(family: str, implementation: str) -> None:
    pairs = busiest(family)
    model, damaged = build(family), zeroed(family, pairs)
    model.set_experts_implementation(implementation)
    damaged.set_experts_implementation(implementation)  # type: ignore[operator]
    whole = logits(model)
    with without_experts(model, pairs):
        skipped = logits(model)
    assert torch.equal(skipped, logits(damaged))  # type: ignore[arg-type]
    assert not torch.allclose(skipped, whole, atol=1e-3)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("family", EVERY)
def test_skipping_nothing_changes_no_bit_and_skipping_all_leaves_no_routed_output(family: str) -> None:
    model = build(family)
    whole = logits(model)
    with without_experts(model, []):
        assert torch.equal(logits(model), whole)
    every = [(layer.index, e) for layer in find_moe_layers(model) for e in range(EXPERTS)]
    added: list[torch.Tensor] = []
    for layer in find_moe_layers(model):
        layer.experts.register_forward_hook(lambda m, a, out: added.append(out))
    with without_experts(model, every):
        logits(model)
    assert all(not out.any() for out in added)
    assert len(added) == len(find_moe_layers(model))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "ernie4_5_moe"])
def test_shared_experts_are_skipped_by_the_number_minus_1(family: str) -> None:
    model, damaged = build(family), build(family)
    layer = find_moe_layers(damaged)[-1]
    with torch.no_grad():
        layer.shared[0].down_proj.weight.zero_()
    with without_experts(model, [(layer.index, SHARED)]):
        assert torch.equal(logits(model), logits(damaged))
    assert not torch.equal(logits(model), logits(damaged))


def test_routing_of_the_layer_is_unchanged() -> None:
    """Choices and soft scores; the gates that reach the experts are those that count."""
    model = build("qwen3_moe")
    pairs = busiest("qwen3_moe")[:2]
    names = ("load", "soft_frequency", "gate_mass", "output_peak")
    whole = record(model, [tokens()], statistics=names).statistics
    with without_experts(model, pairs):
        skipped = record(model, [tokens()], statistics=names).statistics
    assert whole is not None
    assert skipped is not None
    first = pairs[0][0]
    for name in ("load", "soft_frequency", "output_peak"):
        assert torch.equal(whole[first][name], skipped[first][name])
    gone = [expert for _, expert in pairs]
    assert not skipped[first]["gate_mass"][gone].any()
    stay = [e for e in range(EXPERTS) if e not in gone]
    assert torch.equal(whole[first]["gate_mass"][stay], skipped[first]["gate_mass"][stay])  # not renormalised


def test_what_does_not_exist_is_refused_and_leaves_no_hook() -> None:
    model = build("mixtral")
    whole = logits(model)
    for pairs, told in (([(0, 1), (5, 0)], "no MoE layer"), ([(0, 1), (1, 8)], "no such expert")):
        with pytest.raises(BadConfig, match=told), without_experts(model, pairs):
            pass
    with pytest.raises(BadConfig, match="no such expert"), without_experts(model, [(0, SHARED)]):
        pass
    assert torch.equal(logits(model), whole)
    with pytest.raises(UnsupportedModel), without_experts(nn.Linear(2, 2), [(0, 0)]):
        pass


def test_hooks_go_after_an_error_and_contexts_nest() -> None:
    model = build("mixtral")
    whole = logits(model)
    with pytest.raises(ZeroDivisionError), without_experts(model, [(0, 0)]):
        raise ZeroDivisionError
    assert torch.equal(logits(model), whole)
    pairs = busiest("mixtral")
    with without_experts(model, pairs[:1]), without_experts(model, pairs[1:]):
        nested = logits(model)
    with without_experts(model, pairs):
        assert torch.equal(logits(model), nested)


def test_random_experts_are_others_as_many_by_seed() -> None:
    experts = {1: 8, 2: 8, 4: 8}
    like = [(1, 7), (2, 3), (2, 4)]
    for seed in range(20):
        anywhere = random_experts(experts, like, seed=seed)
        assert len(set(anywhere)) == 3
        assert not set(anywhere) & set(like)
        assert anywhere == random_experts(experts, like, seed=seed)
        beside = random_experts(experts, like, seed=seed, same_layers=True)
        assert [layer for layer, _ in beside] == [1, 2, 2]
        assert not set(beside) & set(like)
    assert len({tuple(random_experts(experts, like, seed=seed)) for seed in range(20)}) > 10
    layers = {layer for seed in range(40) for layer, _ in random_experts(experts, like, seed=seed)}
    assert layers == {1, 2, 4}


def test_random_experts_run_out() -> None:
    assert random_experts({0: 3}, [(0, 1)], seed=0, same_layers=True)[0][1] in (0, 2)
    assert len(random_experts({0: 3}, [(0, SHARED)], seed=0)) == 1
    with pytest.raises(BadConfig, match="2 other"):
        random_experts({0: 3}, [(0, 1), (0, 2)], seed=0)


def test_controls_come_from_the_same_layers_where_there_are_so_many() -> None:
    experts = {1: 8, 2: 3, 4: 8}
    for seed in range(20):
        # Of layer 2 one expert is left, so that one of the two comes from elsewhere.
        like = [(1, 7), (2, 0), (2, 1)]
        drawn = random_control(experts, (), like, seed=seed)
        assert len(set(drawn)) == 3
        assert not set(drawn) & set(like)
        assert (2, 2) in drawn
        assert sum(layer == 1 for layer, _ in drawn) >= 1
        assert drawn == random_control(experts, (), like, seed=seed)
        # Shared experts stand for shared ones, routed ones where those are too few.
        drawn = random_control(experts, (1, 2), [(1, SHARED), (1, 3)], seed=seed)
        assert (2, SHARED) in drawn
        assert [layer for layer, e in drawn if e != SHARED] == [1]
        lone = random_control(experts, (1,), [(1, SHARED)], seed=seed)
        assert len(lone) == 1
        assert lone[0][1] != SHARED
    assert len({tuple(random_control(experts, (), [(1, 7)], seed=seed)) for seed in range(20)}) > 4
    with pytest.raises(BadConfig, match="2 other experts are wanted, but there are 1"):
        random_control({0: 3}, (), [(0, 1), (0, 2)], seed=0)


def test_sink_decay_by_hand() -> None:
    # One text, two heads, two queries; the first key is the sink. Head 0 pays it 1 + 0.8, then 1 + 0.08; head 1 pays
    # 0.5 + 0.5, then 0.5 + 0.25. 1 - (1.08 / 1.8 + 0.75 / 1) / 2 = 1 - (0.6 + 0.75) / 2 = 0.325.
    before = torch.tensor([[[[1.0, 0.0], [0.8, 0.2]], [[0.5, 0.5], [0.5, 0.5]]]])
    after = torch.tensor([[[[1.0, 0.0], [0.08, 0.92]], [[0.5, 0.5], [0.25, 0.75]]]])
    first = torch.tensor([[True, False]])
    assert attention_sink_decay(before, after, first) == pytest.approx(0.325)
    assert attention_sink_decay(before, before, first) == 0
    assert attention_sink_decay(before, torch.zeros_like(after), first) == 1
    # A head that paid nothing is left out: the second key, which head 0 pays 0.2 in all, then 0.92.
    both = torch.tensor([[False, True]])
    assert attention_sink_decay(before, after, both) == pytest.approx(1 - (0.92 / 0.2 + 1.25 / 1.0) / 2)
    assert attention_sink_decay(before[:, :1, :1], after[:, :1, :1], both) == 0


def test_sinks_are_found_where_they_stand() -> None:
    """Tokens 5 and 9 are given one huge value by the embedding; nothing else is massive."""
    model = build("mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 3] = 1e4
        model.model.embed_tokens.weight[9, 4] = -2e4
    ids = tokens(2, 10) % 40 + 20
    ids[0, 0], ids[1, 6] = 5, 9
    found = find_sinks(model, ids)
    assert [(s.row, s.position, s.token, s.channel) for s in found] == [(0, 0, 5, 3), (1, 6, 9, 4)]
    assert found[0].value == pytest.approx(1e4, rel=0.01)
    assert found[1].value == pytest.approx(-2e4, rel=0.01)
    assert sinks_mask(found, ids).nonzero().tolist() == [[0, 0], [1, 6]]
    assert find_sinks(build("mixtral"), ids) == []


def test_decay_on_a_live_model_against_its_own_maps() -> None:
    model = build("qwen3_moe")
    pairs, ids = busiest("qwen3_moe"), tokens(2, 7)
    sinks = torch.zeros(2, 7, dtype=torch.bool)
    sinks[:, 0] = True
    chosen = model.config._attn_implementation
    found = measure_sink_decay(model, ids, pairs, sinks)
    assert model.config._attn_implementation == chosen
    damaged = zeroed("qwen3_moe", pairs)
    whole = copy.deepcopy(model)
    maps = []
    for each in (whole, damaged):
        each.set_attn_implementation("eager")  # type: ignore[operator]
        with torch.no_grad():
            maps.append(each(input_ids=ids, use_cache=False, output_attentions=True).attentions)
    assert list(found) == [0, 1]
    for layer, (before, after) in enumerate(zip(*maps, strict=True)):
        ratios = [
            float(after[b, h, :, 0].sum() / before[b, h, :, 0].sum()) for b in range(2) for h in range(before.shape[1])
        ]
        assert found[layer] == pytest.approx(1 - sum(ratios) / len(ratios), abs=1e-6)
    assert found[0] == 0  # attention of the first layer comes before any expert
    assert found[1] != 0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_router_scores_at_the_sinks_and_elsewhere(family: str) -> None:
    model, ids = build(family), tokens(2, 7)
    layer = find_moe_layers(model)[0]
    sinks = torch.zeros(2, 7, dtype=torch.bool)
    sinks[0, 0] = sinks[1, 3] = True
    inputs: list[torch.Tensor] = []
    layer.require_router().register_forward_pre_hook(lambda m, args: inputs.append(args[0].reshape(-1, HIDDEN)))
    (at, other) = sink_router_scores(model, ids, [(layer.index, 2)], sinks)[layer.index, 2]
    logits_TE = inputs[-1].double() @ layer.require_router().weight.detach().double().T
    scores_TE = logits_TE.sigmoid() if family == "deepseek_v3" else logits_TE.softmax(-1)
    picked = [0, 7 + 3]
    rest = [t for t in range(14) if t not in picked]
    assert at == pytest.approx(float(scores_TE[picked, 2].mean()), rel=1e-5)
    assert other == pytest.approx(float(scores_TE[rest, 2].mean()), rel=1e-5)
