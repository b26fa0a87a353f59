"""Every routing policy on every family, in memory and through a saved folder.

A policy of another package joins by being registered: its `examples` are tried here without a line of test code.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moekit
from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.routing import RoutingPlan, plan_routing
from moekit.runtime import RouterPart, attached, detach
from tests.contracts import cases
from tests.families import EXPERTS, FAMILIES, TOP_K, build, logits, tokens
from tests.runtime_cases import statistics

METHODS = [record.name for record in catalogue.methods("routing")]
# Most choices a token that a policy of a family of K = 2 may make; policies of many choices say so by a field `top_k`.
MOST = TOP_K


def plans(family: str, model: PreTrainedModel, method: str) -> list[tuple[RouterPart, RoutingPlan]]:
    """A plan for each example of a method, from recorded statistics and two devices a layer."""
    layers = find_moe_layers(model)
    known = statistics(family, catalogue.get("routing", method).needs)
    devices = {layer.index: [e % 2 for e in range(EXPERTS)] for layer in layers}
    policies = catalogue.get("routing", method).cls.examples(layers[0].geometry)
    return [(p, plan_routing(layers, p, method, known, devices=devices)) for p in policies]


@pytest.mark.parametrize(("method", "family"), cases(METHODS))
def test_a_policy_routes_trains_and_generates(method: str, family: str) -> None:
    model = build(family)
    stock = logits(model)
    names = set(model.state_dict())
    for policy, plan in plans(family, model, method):
        plan.apply(model)
        assert [attachment.part for attachment in attached(model)] == [policy]
        most = getattr(policy, "top_k", None) or MOST
        _check_choices(model, most, catalogue.get("routing", method).traits)
        assert names <= set(model.state_dict()), "stock tensors keep their names"
        _check_gradients(model)
        generated = model.generate(tokens(1), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert generated.shape[1] <= tokens(1).shape[1] + 3
        twin = copy.deepcopy(model)
        detach(model)
        assert set(model.state_dict()) == names
        assert torch.equal(logits(model), stock), f"{policy!r} left something behind"
        plan.apply(model)
        assert torch.equal(logits(twin), logits(model)), "a deep copy must route alike"
        detach(model)


def _check_choices(model: PreTrainedModel, most: int, traits: frozenset[catalogue.Trait]) -> None:
    """Of all routers, in a forward pass: some parts look at more than one router sees."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    routers = [layer.require_router() for layer in find_moe_layers(model)]
    hooks = [router.register_forward_hook(lambda module, args, answer: seen.append(answer)) for router in routers]
    ids = tokens(4, 24)
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(routers)
    for logits_TE, weights_TK, indices_TK in seen:
        assert logits_TE.shape[0] == ids.numel()
        assert logits_TE.shape[1] >= EXPERTS
        assert weights_TK.shape == indices_TK.shape
        assert bool(((indices_TK >= 0) & (indices_TK <= EXPERTS)).all())
        assert bool(torch.isfinite(weights_TK).all())
        assert bool((weights_TK[indices_TK == EXPERTS] == 0).all())
        real = [[e for e in row if e != EXPERTS] for row in indices_TK.tolist()]
        assert all(len(set(row)) == len(row) for row in real)
        assert all(len(row) <= most for row in real), "no more experts than a token may visit"
        assert "variable_k" in traits or all(len(row) == most for row in real)


def _check_gradients(model: PreTrainedModel) -> None:
    model.zero_grad()
    ids = tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for layer in find_moe_layers(model):
        gradients = [p.grad for p in layer.require_router().parameters() if p.grad is not None]
        assert gradients, "no gradient reaches the router"
        assert all(bool(torch.isfinite(g).all()) for g in gradients)
        assert any(bool((p.grad != 0).any()) for p in layer.experts.parameters() if p.grad is not None)
    model.zero_grad()


@pytest.mark.parametrize(("method", "family"), cases(METHODS))
def test_a_saved_policy_comes_back_and_stock_transformers_still_opens_the_folder(
    method: str, family: str, tmp_path: Path
) -> None:
    model = build(family)
    stock = logits(model)
    # The last example is farthest from the family's own routing.
    _, plan = plans(family, model, method)[-1]
    plan.apply(model)
    routed = logits(model)
    moekit.save(model, tmp_path / "out")
    again = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu").eval()
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state_dict().items())
    # Tensors mapped from a file are aligned otherwise than fresh ones: kernels may round the last bit another way.
    torch.testing.assert_close(logits(again), routed, atol=1e-5, rtol=1e-5)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    plainly = routed if "stock" in catalogue.get("routing", method).traits else stock
    torch.testing.assert_close(logits(opened), plainly, atol=1e-5, rtol=1e-5)
    plain = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu", parts=False).eval()
    assert attached(plain) == []
    assert torch.equal(logits(plain), logits(opened))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_loosest_list_starts_from_bit_equal_logits(family: str) -> None:
    model = build(family)
    stock = logits(model)
    (plan,) = [plan for policy, plan in plans(family, model, "c2r") if getattr(policy, "top_t", None) == EXPERTS - 1]
    plan.apply(model)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_constraint_changes_the_logits(family: str) -> None:
    model = build(family)
    stock = logits(model)
    _, plan = plans(family, model, "c2r")[0]
    plan.apply(model)
    assert not torch.equal(logits(model), stock)
