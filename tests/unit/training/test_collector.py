"""Routers are observed once per forward, with their graph, whatever runs around them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from moekit.anatomy import find_moe_layers
from moekit.errors import BadData, UnsupportedModel
from moekit.training.collector import RouterCollector, collect
from moekit.training.losses import balance_loss
from tests.families import EXPERTS, FAMILIES, TOP_K, build, tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_collected_with_its_graph(family: str) -> None:
    model = build(family).train()
    ids = tokens()
    with collect(model) as routed:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert [r.layer.index for r in routed] == [layer.index for layer in find_moe_layers(model)]
        for r in routed:
            assert r.logits_TE.shape == (ids.numel(), EXPERTS)
            assert r.weights_TK.shape == r.indices_TK.shape == (ids.numel(), TOP_K)
            assert r.mask_T is not None
            assert bool(r.mask_T.all())
            assert not r.repeated
        sum(balance_loss(r.logits_TE, r.indices_TK, r.mask_T, scores=r.layer.scores) for r in routed).backward()
        grads = [r.layer.router.weight.grad for r in routed]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert routed == []


@pytest.mark.parametrize(
    ("family", "scores", "bias"),
    [("qwen2_moe", "softmax", False), ("deepseek_v3", "sigmoid", True), ("ernie4_5_moe", "softmax", True)],
)
def test_scores_and_bias_are_found_by_asking(family: str, scores: str, bias: bool) -> None:
    with collect(build(family).train()) as routed:
        pass
    model = build(family).train()
    collector = RouterCollector(model, lambda _: None)
    assert routed == []
    for layer in collector.layers:
        assert layer.scores == scores
        assert (layer.bias is not None) == bias
    collector.close()


def test_nothing_is_collected_in_evaluation_or_without_gradients() -> None:
    model = build("olmoe").train()
    with collect(model) as routed:
        with torch.no_grad():
            model(input_ids=tokens())
        model.eval()
        model(input_ids=tokens())
        assert routed == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_but_is_marked(reentrant: bool) -> None:
    model = build("qwen3_moe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    seen: list[tuple[int, bool]] = []
    collector = RouterCollector(model, lambda r: seen.append((r.layer.index, r.repeated)))
    ids = tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert sorted(seen) == [(0, False), (0, True), (1, False), (1, True)]
    collector.close()


def test_reentrant_checkpointing_is_refused_where_the_gradient_would_be_lost() -> None:
    model = build("qwen3_moe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(UnsupportedModel, match="reentrant"), collect(model):
        model(input_ids=tokens(), use_cache=False)


def test_a_repetition_with_the_mask_of_another_forward_is_an_error_not_a_guess() -> None:
    model = build("olmoe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    collector = RouterCollector(model, lambda _: None)
    losses = [
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        for ids in (tokens(length=12), tokens(length=8))
    ]
    with pytest.raises(BadData, match="16 positions, but the router saw 24 tokens") as caught:
        losses[0].backward()
    assert caught.value.layer == 1
    collector.close()


def test_no_graph_outlives_its_backward() -> None:
    model = build("olmoe").train()
    alive: list[weakref.ref[torch.Tensor]] = []
    collector = RouterCollector(model, lambda r: alive.append(weakref.ref(r.logits_TE)))
    ids = tokens()
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gc.collect()
    assert len(alive) == 6
    assert all(ref() is None for ref in alive)
    collector.close()
    model(input_ids=ids, use_cache=False)
    assert len(alive) == 6
