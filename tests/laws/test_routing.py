"""What a router part promises of the choices it makes: how many, by what, and what they mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.anatomy import find_moe_layers
from moekit.catalogue import MethodRecord
from moekit.runtime import detach
from tests.families import EXPERTS, build, logits, tokens
from tests.parts import stir
from tests.runtime_cases import cases, examples, hang


def chosen(record: MethodRecord, family: str) -> list[tuple[Tensor, Tensor]]:
    """Weights and indices of all layers, for each of the part's examples."""
    model, seen = build(family), []
    for layer in find_moe_layers(model):
        layer.require_router().register_forward_hook(lambda module, args, answer: seen.append(answer[1:]))
    for part in examples(record, model):
        hang(model, family, record, part)
        stir(model)
        logits(model, tokens(4, 24))
        detach(model)
    return seen


@pytest.mark.parametrize(("record", "family"), cases(["routing"]))
def test_no_expert_is_chosen_twice_and_none_has_no_weight(record: MethodRecord, family: str) -> None:
    for weights_TK, indices_TK in chosen(record, family):
        assert bool(weights_TK.isfinite().all())
        assert bool((weights_TK[indices_TK == EXPERTS] == 0).all())
        real = [[expert for expert in row if expert != EXPERTS] for row in indices_TK.tolist()]
        assert all(len(set(row)) == len(row) for row in real)
        assert all(0 <= expert < EXPERTS for row in real for expert in row)


@pytest.mark.parametrize(("record", "family"), cases(["routing"], without=["variable_k"]))
def test_each_token_gets_as_many_experts(record: MethodRecord, family: str) -> None:
    for _, indices_TK in chosen(record, family):
        assert bool((indices_TK < EXPERTS).all()), "a part that leaves experts out declares variable_k"


@pytest.mark.parametrize(("record", "family"), cases(["routing"], "variable_k"))
def test_tokens_get_different_numbers_of_experts(record: MethodRecord, family: str) -> None:
    counts = [(indices_TK < EXPERTS).sum(dim=1) for _, indices_TK in chosen(record, family)]
    assert any(int(count_T.min()) < int(count_T.max()) for count_T in counts)


@torch.no_grad()
@pytest.mark.parametrize(("record", "family"), cases(["routing"], without=["sequence", "attention", "stateful"]))
def test_a_token_is_routed_by_itself(record: MethodRecord, family: str) -> None:
    """Whatever stands beside it, in whatever order: asked without a model around it."""
    model = build(family)
    for part in examples(record, model):
        hang(model, family, record, part)
        stir(model)
        for layer in find_moe_layers(model):
            hidden_TH = torch.randn(30, layer.geometry.hidden, generator=torch.Generator().manual_seed(3))
            order_T = torch.randperm(30, generator=torch.Generator().manual_seed(4))[:11]
            _, weights_TK, indices_TK = layer.require_router()(hidden_TH)
            _, fewer_TK, theirs_TK = layer.require_router()(hidden_TH[order_T])
            assert torch.equal(theirs_TK, indices_TK[order_T])
            torch.testing.assert_close(fewer_TK, weights_TK[order_T], atol=1e-6, rtol=1e-5)
        detach(model)
