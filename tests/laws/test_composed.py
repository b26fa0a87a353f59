"""Score, choose and limit compose, in this order, whatever the order of attaching."""

from __future__ import annotations

import itertools

import pytest
import torch

from moekit.anatomy import find_moe_layers
from moekit.routing import C2R, TopK
from moekit.routing.methods.naee_skip import NAEESkip
from moekit.runtime import attach, attached
from moekit.runtime.tracker import rows
from moekit.trace import record
from tests.families import EXPERTS, build, logits, tokens
from tests.parts import FAMILIES, FirstOnly, Gain, Momentum, Neighbours, Nudge, NullExperts, Recurrence, stir


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_attaching_does_not_matter_between_stages(family: str) -> None:
    outputs = []
    for order in itertools.permutations((Nudge(), TopK(), NAEESkip(beta=0.9))):
        model = build(family)
        for part in order:
            attach(model, part)
        stir(model)
        assert [type(a.part) for a in attached(model)] == [Nudge, TopK, NAEESkip]
        outputs.append(logits(model))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_works_on_what_the_one_before_left(family: str) -> None:
    model = build(family)
    lists = torch.stack([torch.tensor([(e + 1 + j) % EXPERTS for j in range(EXPERTS)]) for e in range(EXPERTS)])
    layers = find_moe_layers(model)
    attach(model, Nudge())
    stir(model)
    attach(model, C2R(top_t=1), {layer.index: {"partners": lists} for layer in layers})
    attach(model, FirstOnly(above=-1e9))
    hidden = torch.randn(40, layers[0].geometry.hidden, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        router = layer.require_router()
        stock = router.stock_forward(hidden)[0]
        nudged, weights, indices = router(hidden)
        delta = router.moekit_parts.Nudge.learned["delta"]
        torch.testing.assert_close(nudged, stock + delta)
        real = indices < EXPERTS
        # FirstOnly leaves one of C2R's two choices, which lie side by side on its ring.
        assert real.sum(dim=1).tolist() == [1] * 40
        assert bool((weights[~real] == 0).all())


def test_parts_of_all_slots_live_together_and_are_saved_in_order() -> None:
    model = build("qwen3_moe")
    for part in (Momentum(), Gain(), FirstOnly(above=0.9), Neighbours(), Recurrence(), Nudge()):
        attach(model, part)
    stir(model)
    found = [type(a.part).__name__ for a in attached(model)]
    assert found == ["Neighbours", "Recurrence", "Nudge", "FirstOnly", "Gain", "Momentum"]
    model.train()
    ids = tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_losses_and_traces_read_the_logits_that_were_routed_by() -> None:
    model = build("qwen3_moe")
    attach(model, NullExperts(count=5, choices=3))
    seen = []
    for layer in find_moe_layers(model):
        layer.require_router().register_forward_hook(lambda module, args, answer: seen.append(answer))
    logits(model)
    assert [answer[0].shape[1] for answer in seen] == [EXPERTS + 5] * 2
    assert all(bool((answer[1][answer[2] == EXPERTS] == 0).all()) for answer in seen)
    trace = record(model, [tokens()], statistics=("load",))
    for layer in trace.meta.layers:
        real = trace.indices(layer) < EXPERTS
        assert 0 < int(real.sum()) < real.numel()
        assert int(trace.require(["load"])[layer]["load"].sum()) == int(real.sum())


def test_a_sequence_may_override() -> None:
    model = build("qwen3_moe")
    attach(model, Nudge())
    ids = tokens(3, 8)
    plain = logits(model, ids)
    own = torch.zeros(3, EXPERTS)
    own[1, 4] = 30.0
    with rows(model, {"nudge": own}):
        changed = logits(model, ids)
    same = [bool(torch.allclose(changed[row], plain[row], atol=1e-5)) for row in range(3)]
    assert same == [True, False, True]
    assert torch.equal(logits(model, ids), plain)
