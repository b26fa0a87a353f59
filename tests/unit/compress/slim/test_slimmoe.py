"""SlimMoE's score against gradients worked by hand and by autograd through weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.trace.expert_batch import ExpertBatch, ExpertGradients
from moekit.trace.loss import divergence_of_likeliest
from moekit.trace.vocabulary import get

UP = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
DOWN = torch.tensor([[1.0, 0.1], [0.0, 0.1]], dtype=torch.float64)


def expert(gate: Tensor, up: Tensor, down: Tensor, x_NH: Tensor) -> tuple[Tensor, Tensor]:
    h_NI = torch.nn.functional.silu(x_NH @ gate.T) * (x_NH @ up.T)
    return h_NI, h_NI @ down.T


def score(name: str, h_NI: Tensor, gradient_NI: Tensor) -> Tensor:
    of_expert = get(name).of_expert
    assert of_expert is not None
    none = torch.zeros(len(h_NI), 2)
    return of_expert(ExpertBatch(0, inner=h_NI, gradients=ExpertGradients(none, gradient_NI, {})))


def test_the_worked_example() -> None:
    """Two neurons, the target (.7, .3): the second adds the same to both logits and may go."""
    gate, up, down = (t.clone().requires_grad_() for t in (torch.eye(2, dtype=torch.float64), UP, DOWN))
    x, target = torch.ones(1, 2, dtype=torch.float64), torch.tensor([0.7, 0.3], dtype=torch.float64)
    h_NI, y_NV = expert(gate, up, down, x)
    h_NI.retain_grad()
    assert y_NV[0].tolist() == pytest.approx([0.7676, 0.0366], abs=5e-5)
    loss = (target * (target.log() - y_NV[0].log_softmax(0))).sum()
    assert float(loss.detach()) == pytest.approx(0.001440, abs=5e-7)
    loss.backward()  # type: ignore[no-untyped-call]
    assert h_NI.grad is not None
    found = score("neuron_taylor_size", h_NI.detach(), h_NI.grad)
    assert found.tolist() == pytest.approx([0.01825, 0.0], abs=5e-6)
    sums = {}
    for name, weight, axis in (("gate", gate, 1), ("up", up, 1), ("down", down, 0)):
        assert weight.grad is not None
        sums[name] = (weight.detach() * weight.grad).sum(axis).abs().tolist()
    assert sums["gate"] == pytest.approx([0.02316, 0.0], abs=5e-6)
    assert sums["up"] == pytest.approx(found.tolist(), abs=1e-12), "Euler: up row, down column and h agree"
    assert sums["down"] == pytest.approx(found.tolist(), abs=1e-12)


def test_the_worked_example_by_the_loss_of_a_teacher() -> None:
    """The target as a teacher's logits: the same loss, and the signed sums of gate, up and down."""
    weights = [t.clone().requires_grad_() for t in (torch.eye(2, dtype=torch.float64), UP, DOWN)]
    _, y_NV = expert(*weights, torch.ones(1, 2, dtype=torch.float64))
    said_NV = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log() + 5
    loss = divergence_of_likeliest(y_NV, said_NV, 8)
    assert float(loss.detach()) == pytest.approx(0.001440, abs=5e-7)
    loss.backward()  # type: ignore[no-untyped-call]
    for weight, axis, wanted in zip(weights, (1, 1, 0), (0.02316, 0.01825, 0.01825), strict=True):
        assert weight.grad is not None
        assert (weight.detach() * weight.grad).sum(axis).abs().tolist() == pytest.approx([wanted, 0.0], abs=5e-6)


def test_logits_beyond_the_likeliest_count_nowhere_and_the_teacher_itself_gives_nothing() -> None:
    g = torch.Generator().manual_seed(5)
    said, own = torch.randn(3, 20, generator=g).double(), torch.randn(3, 20, generator=g).double()
    listed = said.topk(8).indices
    by_hand = 0.0
    for n in range(3):
        q, p = (t[n, listed[n]].exp() / t[n, listed[n]].exp().sum() for t in (said, own))
        by_hand += float((q * (q / p).log()).sum())
    assert float(divergence_of_likeliest(own, said, 8)) == pytest.approx(by_hand, rel=1e-12)
    beyond = torch.ones(3, 20).scatter(1, listed, 0).double()
    assert float(divergence_of_likeliest(own + 9 * beyond, said, 8)) == pytest.approx(by_hand, rel=1e-12)
    same = said.clone().requires_grad_()
    loss = divergence_of_likeliest(same, said, 8)
    loss.backward()  # type: ignore[no-untyped-call]
    assert same.grad is not None
    assert float(loss.detach()) == pytest.approx(0, abs=1e-14)
    assert float(same.grad.abs().max()) < 1e-14


def test_of_one_token_it_is_what_up_row_and_down_column_say_and_tokens_do_not_cancel() -> None:
    g = torch.Generator().manual_seed(3)
    gate, up, down = (torch.randn(*s, generator=g).double().requires_grad_() for s in ((6, 4), (6, 4), (4, 6)))
    x_NH, pull_NH = torch.randn(9, 4, generator=g).double(), torch.randn(9, 4, generator=g).double()
    by_token = torch.zeros(6).double()
    for x_H, pull_H in zip(x_NH, pull_NH, strict=True):
        _, y = expert(gate, up, down, x_H[None])
        of_up, of_down = torch.autograd.grad((y[0] * pull_H).sum(), (up, down))
        torch.testing.assert_close((up * of_up).sum(1), (down * of_down).sum(0))
        by_token += (down * of_down).sum(0).abs().detach()
    h_NI, y_NH = expert(gate, up, down, x_NH)
    (gradient_NI,) = torch.autograd.grad((y_NH * pull_NH).sum(), h_NI)
    found = score("neuron_taylor_size", h_NI.detach(), gradient_NI)
    torch.testing.assert_close(found, by_token)
    signed = score("neuron_taylor", h_NI.detach(), gradient_NI)
    assert bool((found > signed.abs()).all())
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(
        score("neuron_taylor_size", h_NI.detach()[:, order], gradient_NI[:, order]), found[order]
    )
    fisher = score("neuron_fisher", h_NI.detach(), gradient_NI)
    torch.testing.assert_close(fisher, (h_NI * gradient_NI).detach().square().sum(0))
