"""Losses against hand-worked numbers, and against transformers' pooled loss where that one is right."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moekit.training.losses import (
    balance_loss,
    cv_squared,
    expert_load,
    importance,
    probabilities,
    z_loss,
)


def _logits(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax is given by rows of probabilities."""
    return torch.tensor(rows).log()


def test_balance_loss_by_hand() -> None:
    # f = (2/3, 1/3, 0), P = mean of rows = (0.5, 0.3, 0.2); 3 * (0.5 * 2/3 + 0.3 / 3) = 1.3
    logits = _logits([0.6, 0.3, 0.1], [0.6, 0.2, 0.2], [0.3, 0.4, 0.3])
    assert balance_loss(logits, torch.tensor([[0], [0], [1]])).item() == pytest.approx(1.3, abs=1e-6)


def test_balance_loss_is_one_when_uniform_and_e_when_collapsed() -> None:
    uniform = torch.zeros(8, 4)
    spread = torch.arange(8).remainder(4).unsqueeze(1)
    assert balance_loss(uniform, spread).item() == pytest.approx(1.0)
    pairs = torch.stack([torch.arange(8).remainder(4), (torch.arange(8) + 1).remainder(4)], dim=1)
    assert balance_loss(uniform, pairs).item() == pytest.approx(1.0)  # whatever K is
    certain = torch.full((8, 4), -1e4)
    certain[:, 2] = 0
    assert balance_loss(certain, torch.full((8, 1), 2)).item() == pytest.approx(4.0)


def test_equals_transformers_over_k_for_one_layer_of_plain_top_k() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    indices = logits.topk(2, dim=-1).indices
    mask = torch.arange(50) < 37
    theirs = load_balancing_loss_func((logits,), 8, 2, mask.view(1, 50).long())
    torch.testing.assert_close(balance_loss(logits, indices, mask) * 2, theirs)


def test_differs_from_transformers_where_a_bias_or_a_constraint_changes_the_choice() -> None:
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    # A selection bias sends every token to expert 7 as well: the real load is badly unbalanced, the logits are not.
    biased = (logits + torch.tensor([0.0] * 7 + [100.0])).topk(2, dim=-1).indices
    theirs = load_balancing_loss_func((logits,), 8, 2) / 2
    load = torch.bincount(biased.flatten(), minlength=8) / biased.numel()
    expected = 8 * (load * logits.softmax(-1).mean(0)).sum()
    ours = balance_loss(logits, biased)
    torch.testing.assert_close(ours, expected)
    assert load[7] == 0.5
    assert (ours - theirs).abs() > 1e-3
    # And the gradient presses expert 7 down, as it must; that of the re-derived choice does not know of it.
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(balance_loss(logits, biased), logits)
    (wrong,) = torch.autograd.grad(load_balancing_loss_func((logits,), 8, 2), logits)
    assert grad.sum(0)[7] > 5 * wrong.sum(0)[7].abs()


def test_layers_unbalanced_in_opposite_ways_do_not_cancel() -> None:
    low, high = torch.full((6, 4), -3.0), torch.full((6, 4), -3.0)
    low[:, :2], high[:, 2:] = 3.0, 3.0
    choices = [layer.topk(2, dim=-1).indices for layer in (low, high)]
    pooled = load_balancing_loss_func((low, high), 4, 2) / 2
    per_layer = [balance_loss(layer, chosen) for layer, chosen in zip((low, high), choices, strict=True)]
    assert pooled.item() == pytest.approx(1.0, abs=1e-5)  # looks perfect
    assert all(loss > 1.9 for loss in per_layer)


def test_padding_and_empty_places_count_nowhere() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    indices = torch.tensor([[0, 1], [2, 4], [3, 0], [1, 1], [2, 2]])
    mask = torch.tensor([True, True, True, False, False])
    assert expert_load(indices, 4, mask).tolist() == [2, 1, 1, 1]
    torch.testing.assert_close(balance_loss(logits, indices, mask), balance_loss(logits[:3], indices[:3]))
    torch.testing.assert_close(z_loss(logits, mask), z_loss(logits[:3]))
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.0], [0.25, 0.75], [1.0, 1.0], [1.0, 1.0]])
    assert importance(weights, indices, 4, mask).tolist() == [1.25, 0.5, 0.8999999761581421, 0.25]


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_but_padding_gives_zero_and_a_zero_gradient(rows: int) -> None:
    logits = torch.randn(rows, 4, requires_grad=True)
    indices = torch.zeros(rows, 2, dtype=torch.int64)
    mask = torch.zeros(rows, dtype=torch.bool)
    total = balance_loss(logits, indices, mask) + z_loss(logits, mask)
    total.backward()
    assert total.item() == 0.0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


def test_z_loss_by_hand() -> None:
    # logsumexp of log-probabilities is 0; adding 3 to every logit makes it 3.
    logits = _logits([0.2, 0.3, 0.5], [0.1, 0.1, 0.8])
    assert z_loss(logits).item() == pytest.approx(0.0, abs=1e-10)
    assert z_loss(logits + 3).item() == pytest.approx(9.0, rel=1e-6)


def test_cv_squared_by_hand() -> None:
    # mean 2, population variance 2/3
    assert cv_squared(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx((2 / 3) / 4)
    assert cv_squared(torch.tensor([5, 5, 5])).item() == 0.0
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4]], requires_grad=True)
    loss = cv_squared(importance(weights, torch.tensor([[0, 1], [0, 1]]), 2))
    loss.backward()
    assert weights.grad is not None
    assert weights.grad[0, 0] > 0 > weights.grad[0, 1]  # less weight for the expert that has too much


def test_sigmoid_scores_sum_to_one() -> None:
    logits = torch.tensor([[0.0, 0.0, torch.log(torch.tensor(3.0)).item()]])  # sigmoids 1/2, 1/2, 3/4
    torch.testing.assert_close(probabilities(logits, "sigmoid"), torch.tensor([[2 / 7, 2 / 7, 3 / 7]]))
    assert bool(torch.isfinite(probabilities(torch.full((1, 3), -1e4), "sigmoid")).all())
