"""What holds for every registered balancer: it drives a load towards even, rests there, and adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import catalogue
from moekit.training.balancers.base import Balancer, State, read_balancer
from moekit.training.batch import MicroBatch
from moekit.training.collector import Routed
from moekit.training.layers import TrainedLayer, trained_layers
from tests.families import EXPERTS, build

TOKENS, TOP_K = 512, 2
ALL = list(catalogue.methods("balancer"))


@pytest.fixture(scope="module")
def layer() -> TrainedLayer:
    found = trained_layers(build("deepseek_v3"))[0]
    assert found.bias is not None
    return replace(found, bias=torch.zeros(EXPERTS))


def make(record: catalogue.MethodRecord, **knobs: Any) -> Balancer:
    """Its first example, with knobs."""
    example = record.cls.examples()[0]
    made: Balancer = catalogue.make("balancer", record.name, {**example.model_dump(exclude_unset=True), **knobs})
    return made


def skewed(seed: int = 0) -> Tensor:
    """Logits of which some experts are liked by all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, EXPERTS, generator=generator) + torch.linspace(1.0, -1.0, EXPERTS)


def choose(layer: TrainedLayer, logits_TE: Tensor, bias_E: Tensor) -> Routed:
    scores_TE = logits_TE.sigmoid()
    indices_TK = (scores_TE + bias_E).topk(TOP_K).indices
    weights_TK = scores_TE.gather(1, indices_TK)
    return Routed(replace(layer, bias=bias_E), logits_TE, weights_TK, indices_TK, None, False, MicroBatch())


def worst(routed: Routed) -> float:
    """Load of the busiest expert over the mean, less one."""
    load_E = torch.bincount(routed.indices_TK.flatten(), minlength=EXPERTS).double()
    return float(load_E.max() / load_E.mean() - 1)


@pytest.mark.parametrize("record", ALL, ids=lambda r: r.name)
@pytest.mark.parametrize("center", [False, True])
def test_a_skewed_load_becomes_even(record: catalogue.MethodRecord, center: bool, layer: TrainedLayer) -> None:
    rule, bias_E, state = make(record, center=center), torch.zeros(EXPERTS), State()
    logits_TE = skewed()
    before = worst(choose(layer, logits_TE, bias_E))
    assert before > 0.8
    for _ in range(100):
        bias_E = bias_E + rule.delta(rule.counts(choose(layer, logits_TE, bias_E)), state)
    assert worst(choose(layer, logits_TE, bias_E)) < 0.1 * before
    if center:
        assert float(bias_E.mean()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("record", ALL, ids=lambda r: r.name)
def test_an_even_load_is_left_alone(record: catalogue.MethodRecord, layer: TrainedLayer) -> None:
    logits_TE = torch.zeros(EXPERTS, EXPERTS)
    for token in range(EXPERTS):  # each token likes its own expert and the next
        logits_TE[token, token] = logits_TE[token, (token + 1) % EXPERTS] = 3.0
    rule = make(record)
    even = choose(layer, logits_TE, torch.zeros(EXPERTS))
    assert worst(even) == 0
    assert not rule.delta(rule.counts(even), {}).any()


@pytest.mark.parametrize("record", ALL, ids=lambda r: r.name)
def test_nothing_chosen_moves_nothing_and_padding_and_no_expert_do_not_count(
    record: catalogue.MethodRecord, layer: TrainedLayer
) -> None:
    rule = make(record)
    seen = choose(layer, skewed()[:64], torch.zeros(EXPERTS))
    none = replace(seen, indices_TK=torch.full_like(seen.indices_TK, EXPERTS), mask_T=torch.zeros(64, dtype=torch.bool))
    assert not rule.delta(rule.counts(none), {}).any()
    mask_T = torch.arange(64) < 40
    short = replace(seen, logits_TE=seen.logits_TE[:40], indices_TK=seen.indices_TK[:40])
    assert torch.equal(rule.counts(replace(seen, mask_T=mask_T)), rule.counts(short))


@pytest.mark.parametrize("record", ALL, ids=lambda r: r.name)
def test_counts_of_micro_batches_and_ranks_add_up(record: catalogue.MethodRecord, layer: TrainedLayer) -> None:
    rule = make(record)
    seen = choose(layer, skewed(), torch.zeros(EXPERTS))
    halves = [
        replace(seen, logits_TE=seen.logits_TE[p], indices_TK=seen.indices_TK[p])
        for p in (slice(0, 100), slice(100, TOKENS))
    ]
    assert torch.equal(rule.counts(halves[0]) + rule.counts(halves[1]), rule.counts(seen))


@pytest.mark.parametrize("record", ALL, ids=lambda r: r.name)
def test_what_it_remembers_is_all_that_a_resumed_run_needs(record: catalogue.MethodRecord, layer: TrainedLayer) -> None:
    def steps(rule: Balancer, bias_E: Tensor, state: State, count: int) -> Tensor:
        for _ in range(count):
            bias_E = bias_E + rule.delta(rule.counts(choose(layer, skewed(), bias_E)), state)
        return bias_E

    state = State()
    straight_E = steps(make(record), torch.zeros(EXPERTS), State(), 6)
    half_E = steps(make(record), torch.zeros(EXPERTS), state, 3)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    assert torch.equal(steps(make(record), half_E, kept, 3), straight_E)


LOAD = torch.tensor([3, 2, 1])


def test_steps_worked_out_by_hand() -> None:
    assert read_balancer({"use": "sign", "rate": 0.1}).step(LOAD, {}).tolist() == pytest.approx([-0.1, 0, 0.1])
    assert read_balancer({"use": "proportional", "rate": 0.1}).step(LOAD, {}).tolist() == pytest.approx(
        [-0.05, 0, 0.05]
    )
    rule, state = read_balancer({"use": "pi", "rate": 0.1, "gain": 1.0}), State()
    assert rule.step(LOAD, state).tolist() == pytest.approx([-0.55, 0, 0.55])  # gain * r + rate * r
    assert rule.step(LOAD, state).tolist() == pytest.approx([-0.05, 0, 0.05])  # r did not change
    assert rule.step(torch.tensor([2, 2, 2]), state).tolist() == pytest.approx([0.5, 0, -0.5])  # gain * (0 - r)


def test_a_whole_quantile_step_gives_the_share(layer: TrainedLayer) -> None:
    """Two experts would each have had T K / E tokens, had the others stood still."""
    rule = read_balancer({"use": "quantile", "rate": 1.0})
    logits_TE = skewed()
    seen = choose(layer, logits_TE, torch.zeros(EXPERTS))
    delta_E = rule.step(rule.counts(seen), {})
    for expert in (0, EXPERTS - 1):
        alone_E = torch.zeros(EXPERTS)
        alone_E[expert] = delta_E[expert]
        load = int((choose(layer, logits_TE, alone_E).indices_TK == expert).sum())
        assert load == pytest.approx(TOKENS * TOP_K / EXPERTS, abs=2)


def test_the_worked_example_of_sign_steps_comes_to_rest() -> None:
    """Three experts, one choice a token, a rate of 0.02: even after ten steps, and still after that."""
    scores_TE = torch.tensor(
        [[0.9, 0.3, 0.2], [0.8, 0.5, 0.1], [0.7, 0.6, 0.2], [0.6, 0.2, 0.5], [0.2, 0.7, 0.4], [0.5, 0.45, 0.3]]
    )
    rule, bias_E = read_balancer({"use": "sign", "rate": 0.02}), torch.zeros(3)
    loads = []
    for _ in range(12):
        load_E = torch.bincount((scores_TE + bias_E).argmax(dim=1), minlength=3)
        loads.append(load_E.tolist())
        bias_E = bias_E + rule.step(load_E, {})
    assert loads[0] == [5, 1, 0]
    assert loads[10] == loads[11] == [2, 2, 2]
    assert bias_E.tolist() == pytest.approx([-0.12, 0, 0.16], abs=1e-6)
