"""Skipping with protected tokens: importance by hand, and against the attention map that a model returns."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import DynamicCache

from moekit.anatomy import Gate, GateSpec, Geometry, find_moe_layers
from moekit.errors import BadConfig, BadData
from moekit.routing import plan_routing
from moekit.routing.methods.odp import ODP, importance, largest_of_each, largest_so_far
from moekit.runtime import PlanInputs, attach, detach
from tests.families import EXPERTS, build, logits, tokens
from tests.routing import routed

# Tokens by row: each pays attention to itself and those before it.
MAP = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.2, 0.3, 0.5]])
NORMS = torch.tensor([[2.0, 3.0, 1.0]])


def geometry(top_k: int = 2) -> Geometry:
    return Geometry(8, 3, top_k, 8, 0, True, False, False, True)


def test_importance_by_hand() -> None:
    # Columns add up to 1.6, 0.9, 0.5; 3, 2, 1 tokens can look: 2 * 1.6 / 3, 3 * 0.9 / 2, 1 * 0.5 / 1.
    found = importance(NORMS, MAP.sum(dim=0, keepdim=True), torch.tensor([[3, 2, 1]]))
    torch.testing.assert_close(found, torch.tensor([[3.2 / 3, 1.35, 0.5]]))
    assert largest_of_each(found, torch.ones(1, 3, dtype=torch.bool), 0.02).tolist() == [[False, True, False]]


def test_the_share_is_of_each_sequences_tokens_and_rounded_up() -> None:
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    real = torch.tensor([[False, True, True, True], [True, True, True, True]])
    # 0.5 of three is two, of four is two; the padding's 9 does not count.
    assert largest_of_each(scores, real, 0.5).tolist() == [[False, False, True, True], [False, False, True, True]]
    assert not bool(largest_of_each(scores, real, 0.0).any())
    assert torch.equal(largest_of_each(scores, real, 1.0), real)
    fifty = torch.arange(50.0).unsqueeze(0)
    assert int(largest_of_each(fifty, torch.ones(1, 50, dtype=torch.bool), 0.02).sum()) == 1


def test_norms_are_ranked_among_those_so_far() -> None:
    norms = torch.tensor([[2.0, 3.0, 1.0, 2.5]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril().unsqueeze(0)
    # Larger ones up to each: 0 of 1, 0 of 2, 2 of 3, 1 of 4; a half protects those with fewer than 0.5, 1, 1.5, 2.
    assert largest_so_far(norms, causal, 0.5).tolist() == [[True, True, False, True]]
    assert largest_so_far(norms, causal[:, 2:], 0.5).tolist() == [[False, True]]
    assert not bool(largest_so_far(norms, causal, 0.0).any())
    assert bool(largest_so_far(norms, causal, 1.0).all())


def test_without_protection_a_small_second_weight_is_skipped() -> None:
    scores = torch.tensor([[0.8, 0.2, 1e-9], [0.6, 0.4, 1e-9]])
    gate = Gate(GateSpec(2, normalise=True), nn.Identity())
    weights, indices = routed(ODP(mu=0.5, protect="none"), gate, scores.log())
    assert indices.tolist() == [[0, 3], [0, 1]]  # 0.25 is below a half, 0.67 is not
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [0.6, 0.4]]))
    weights, indices = routed(ODP(share=0.0), gate, scores.log(), {"mu": torch.tensor(0.7)})
    assert indices.tolist() == [[0, 3], [0, 3]]


@pytest.mark.parametrize("part", [ODP(mu=0.0), ODP(mu=1.0, share=1.0), ODP(mu=1.0, share=1.0, protect="attention")])
def test_no_threshold_or_all_protected_changes_nothing(part: ODP) -> None:
    model = build("qwen3_moe")
    stock = logits(model)
    attach(model, part)
    assert torch.equal(logits(model), stock)


def _seen(part: ODP, ids: Tensor, implementation: str) -> list[Tensor]:
    """Whether each token keeps both experts, by layer: [B, S]."""
    model, found = build("qwen3_moe"), []
    model.set_attn_implementation(implementation)
    attach(model, part)
    for layer in find_moe_layers(model):
        layer.require_router().register_forward_hook(
            lambda module, args, answer: found.append((answer[2] < EXPERTS).all(dim=1).view(ids.shape))
        )
    logits(model, ids)
    return found


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attended_tokens_are_protected(implementation: str) -> None:
    """The first layer against the map that eager attention returns; later ones see other hidden states."""
    ids = tokens(2, 20)
    kept = _seen(ODP(mu=1.0, protect="attention", share=0.2), ids, implementation)[0]
    model, hidden = build("qwen3_moe"), []
    model.set_attn_implementation("eager")
    find_moe_layers(model)[0].require_router().register_forward_hook(
        lambda module, args, answer: hidden.append(args[0].view(2, 20, -1))
    )
    attention = model(input_ids=ids, use_cache=False, output_attentions=True).attentions[0].mean(dim=1)
    expected = torch.zeros(2, 20, dtype=torch.bool)
    for row in range(2):
        scores = [float(hidden[0][row, j].abs().sum() * attention[row, j:, j].sum() / (20 - j)) for j in range(20)]
        for j in sorted(range(20), key=lambda j: -scores[j])[:4]:
            expected[row, j] = True
    assert torch.equal(kept, expected)


def test_a_pass_behind_a_cache_protects_by_the_norm() -> None:
    ids = tokens(1, 8)
    model = build("qwen3_moe")
    by_norm, by_attention = ODP(mu=1.0, share=0.3), ODP(mu=1.0, share=0.3, protect="attention")
    found = []
    for part in (by_norm, by_attention):
        attach(model, part, layers=[0])
        layer, cache = find_moe_layers(model)[0], DynamicCache(config=model.config)
        seen: list[Tensor] = []
        hook = layer.require_router().register_forward_hook(
            lambda module, args, answer, seen=seen: seen.append(answer[2])
        )
        with torch.no_grad():
            model(input_ids=ids[:, :1], past_key_values=cache)  # a single token is always protected
            for j in range(1, 8):
                model(input_ids=ids[:, j : j + 1], past_key_values=cache)
        hook.remove()
        detach(model)
        found.append(torch.cat(seen))
    assert torch.equal(*found)
    assert bool((found[0] == EXPERTS).any())


def test_settings_are_checked() -> None:
    with pytest.raises(BadConfig, match="second") as refused:
        ODP().check(geometry(4), layer=3)
    assert refused.value.layer == 3
    with pytest.raises(BadData, match="no ratios"):
        ODP().plan(PlanInputs(3, geometry()))
    counts = torch.zeros(512, dtype=torch.int64)
    counts[128] = 3
    made = ODP().plan(PlanInputs(3, geometry(), {"gate_ratio": counts}))
    assert float(made["mu"]) == pytest.approx(128.5 / 512)
    assert ODP(mu=0.3).plan(PlanInputs(3, geometry())) == {}
    with pytest.raises(ValidationError):
        ODP(share=1.5)


def test_attention_trains_with_checkpointing() -> None:
    model, gradients = build("qwen3_moe"), []
    attach(model, ODP(mu=0.9, share=0.2, protect="attention"))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        ids = tokens(2, 12)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert gradients[0]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


def test_a_plan_of_scalars_has_a_hash_that_tells_them_apart() -> None:
    counts = torch.zeros(512, dtype=torch.int64)
    hashes = set()
    for ratio in (100, 200):
        known = {index: {"gate_ratio": counts.index_fill(0, torch.tensor([ratio]), 3)} for index in (0, 1)}
        hashes.add(plan_routing(find_moe_layers(build("mixtral")), ODP(), "odp", known).hash)
    assert len(hashes) == 2
