"""Gradients under activation checkpointing are those without it; where they would be wrong, it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.catalogue import MethodRecord, Trait
from moekit.errors import UnsupportedModel
from moekit.runtime import attach
from moekit.runtime.part import RuntimePart
from tests.families import build, tokens
from tests.parts import NullExperts, Recurrence, stir
from tests.runtime_cases import cases, hang

KINDS = ("routing", "block", "experts")
READ_THE_PASS: tuple[Trait, ...] = ("stateful", "sequence", "attention")


def gradients(model: PreTrainedModel, batches: list[Tensor], *, checkpointed: bool, reentrant: bool = False):
    """Gradients of the sum of losses: all forward passes, then one backward."""
    model.train()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hung(family: str, record: MethodRecord) -> PreTrainedModel:
    model = build(family)
    hang(model, family, record)
    stir(model)
    return model


def made(family: str, *parts: RuntimePart) -> PreTrainedModel:
    model = build(family)
    for part in parts:
        attach(model, part)
    stir(model)
    return model


@pytest.mark.parametrize(("record", "family"), cases(KINDS))
def test_not_reentrant_is_exact(record: MethodRecord, family: str) -> None:
    ids = [tokens(2, 10)]
    plain = gradients(hung(family, record), ids, checkpointed=False)
    again = gradients(hung(family, record), ids, checkpointed=True)
    assert again.keys() >= plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_several_passes_before_one_backward_are_told_apart() -> None:
    ids = [tokens(2, 10, seed=1), tokens(2, 10, seed=2), tokens(1, 7, seed=3)]
    plain = gradients(made("qwen3_moe", Recurrence()), ids, checkpointed=False)
    again = gradients(made("qwen3_moe", Recurrence()), ids, checkpointed=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_too_many_passes_before_one_backward_are_refused() -> None:
    ids = [tokens(1, 6, seed=seed) for seed in range(6)]
    with pytest.raises(UnsupportedModel, match="not known any more"):
        gradients(made("qwen3_moe", Recurrence()), ids, checkpointed=True)


@pytest.mark.parametrize(("record", "family"), cases(KINDS, any_of=READ_THE_PASS, families=1))
def test_reentrant_is_refused_for_parts_that_read_their_pass(record: MethodRecord, family: str) -> None:
    with pytest.raises(UnsupportedModel, match="reentrant") as refused:
        gradients(hung(family, record), [tokens()], checkpointed=True, reentrant=True)
    assert "use_reentrant" in str(refused.value.hint)


@pytest.mark.parametrize(("record", "family"), cases(KINDS, without=READ_THE_PASS, families=1))
def test_reentrant_is_exact_for_parts_that_read_their_layer_only(record: MethodRecord, family: str) -> None:
    plain = gradients(hung(family, record), [tokens()], checkpointed=False)
    again = gradients(hung(family, record), [tokens()], checkpointed=True, reentrant=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_a_loss_of_a_part_enters_the_backward_pass() -> None:
    """Against the same loss added by hand: m + E columns, load of all, no gradient through the load."""
    ids = [tokens()]
    with_loss = gradients(made("qwen3_moe", NullExperts(coefficient=0.5)), ids, checkpointed=False)
    model = made("qwen3_moe", NullExperts(coefficient=0.0))
    losses: list[Tensor] = []

    def look(module: torch.nn.Module, args: object, answer: tuple[Tensor, Tensor, Tensor]) -> None:
        share_TN = answer[0].softmax(-1)
        load_N = torch.zeros(share_TN.shape[1])
        for row in share_TN.topk(3, dim=-1).indices.tolist():
            for column in row:
                load_N[column] += 1 / (3 * len(share_TN))
        losses.append(share_TN.shape[1] * (load_N * share_TN.mean(0)).sum())

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(look)
    model.train()
    loss = model(input_ids=ids[0], labels=ids[0], use_cache=False).loss
    (loss + 0.5 * torch.stack(losses).sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(with_loss[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
