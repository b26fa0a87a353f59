"""The sliced loss is the stock loss, to rounding, with the same gradients, in every family."""

from __future__ import annotations

import copy

import pytest
import torch

from moekit.training import head
from moekit.training.head import linear_cross_entropy
from moekit.training.own_loss import sliced_cross_entropy
from tests.families import FAMILIES, build, logits, tokens


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE_BYTES", 16 * 4 * 128)  # 16 rows of 128 words


@pytest.mark.parametrize("bias", [False, True])
def test_against_torch_in_float64(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 12, generator=generator)
    weight = torch.randn(128, 12, generator=generator)
    extra = torch.randn(128, generator=generator) if bias else None
    labels = torch.randint(0, 128, (70,), generator=generator)
    labels[::7] = -100
    inputs = [t.clone().requires_grad_() for t in (hidden, weight, extra) if t is not None]
    loss = linear_cross_entropy(inputs[0], inputs[1], inputs[2] if bias else None, labels)
    (loss * 0.5).backward()
    doubles = [t.double().requires_grad_() for t in (hidden, weight, extra) if t is not None]
    reference = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*doubles), labels, reduction="sum", ignore_index=-100
    )
    (reference * 0.5).backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    for got, expected in zip(inputs, doubles, strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_keeps_its_loss_and_gradients(family: str) -> None:
    model = build(family)
    stock = copy.deepcopy(model)
    ids = tokens(3, 20)
    labels = ids.clone()
    labels[1, 10:] = -100
    expected = stock(input_ids=ids, labels=labels, use_cache=False).loss
    expected.backward()
    with sliced_cross_entropy(model) as sliced:
        assert sliced
        loss = sliced(input_ids=ids, labels=labels, use_cache=False)
        loss.backward()
        # All other calls are the family's own, labels or not.
        assert torch.equal(model(input_ids=ids, labels=labels).logits, stock(input_ids=ids).logits)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for (name, p), (_, q) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(logits(model), logits(stock))  # everything is back in place


def test_accumulated_batches_divide_by_all_their_words() -> None:
    model, ids = build("qwen2_moe"), tokens(2, 10)
    expected = model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=100).loss
    with sliced_cross_entropy(model) as sliced:
        loss = sliced(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=100)
    torch.testing.assert_close(loss, expected)


def test_a_family_that_bends_its_logits_stays_stock() -> None:
    model = build("qwen2_moe")
    plain = type(model).forward

    class Capped(type(model)):  # type: ignore[misc]
        def forward(self, *args, labels=None, **kwargs):  # type: ignore[no-untyped-def]
            out = plain(self, *args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            out.loss = None if labels is None else self.loss_function(out.logits, labels, self.vocab_size)
            return out

    model.__class__ = Capped
    ids = tokens()
    with torch.no_grad():
        model.lm_head.weight *= 20
    before = model(input_ids=ids, labels=ids).loss
    with sliced_cross_entropy(model) as sliced:
        assert not sliced
        torch.testing.assert_close(sliced(input_ids=ids, labels=ids), before)


def test_a_frozen_head_costs_no_gradient() -> None:
    model, ids = build("olmoe"), tokens()
    model.lm_head.weight.requires_grad_(False)
    with sliced_cross_entropy(model) as sliced:
        sliced(input_ids=ids, labels=ids, use_cache=False).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad is not None


def test_bf16_products_stay_near_the_fp32_loss() -> None:
    model, ids = build("olmoe"), tokens(4, 32)
    expected = model(input_ids=ids, labels=ids).loss
    with sliced_cross_entropy(model) as sliced, torch.autocast("cpu", torch.bfloat16):
        loss = sliced(input_ids=ids, labels=ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
