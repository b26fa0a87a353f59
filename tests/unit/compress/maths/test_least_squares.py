"""The repair of narrowed matrices against hand-worked numbers and against gradients of the error itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.compress.maths.least_squares import narrowed, refit, squared_error

DOWN = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]]).double()
INNER = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [0.0, 1.0, 2.0], [1.0, 0.0, 1.0]]).double()
GATES = torch.tensor([0.5, 1.0, 0.8, 0.6], dtype=torch.float64)
KEPT = torch.tensor([0, 1])


def moment(inner: Tensor, gates: Tensor) -> Tensor:
    return torch.einsum("n,ni,nj->ij", gates**2, inner, inner)


def error(down: Tensor, inner: Tensor, gates: Tensor, kept: Tensor, made: Tensor) -> float:
    """Token by token."""
    total = 0.0
    for h, w in zip(inner, gates, strict=True):
        total += float(w) ** 2 * float((down @ h - made @ h[kept]).square().sum())
    return total


def case(seed: int, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 9, generator=g).double()
    inner = torch.randn(tokens, 5, generator=g).double() @ mix + 0.3 * torch.randn(tokens, 9, generator=g).double()
    return (
        torch.randn(4, 9, generator=g).double(),
        inner,
        torch.rand(tokens, generator=g).double(),
        torch.tensor([7, 0, 3, 4]),
    )


def test_the_worked_example() -> None:
    found = moment(INNER, GATES)
    expected = torch.tensor([[4.61, 2.25, 2.36], [2.25, 1.89, 2.28], [2.36, 2.28, 3.92]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert squared_error(DOWN, found, KEPT, DOWN[:, KEPT]) == pytest.approx(3.9200, abs=1e-12)
    for ridge, row, left in ((0.0, [0.1834, -0.4247], 1.1045), (0.1, [-0.0166, -0.0125], 1.2391)):
        made = narrowed(DOWN, found, KEPT, ridge)
        assert made[0].tolist() == [1.0, 2.0], "a row that lost no neuron stays, to the bit"
        assert made[1].tolist() == pytest.approx(row, abs=5e-5)
        assert squared_error(DOWN, found, KEPT, made) == pytest.approx(left, abs=5e-5)
        assert squared_error(DOWN, found, KEPT, made) == pytest.approx(error(DOWN, INNER, GATES, KEPT, made), rel=1e-9)


def test_all_neurons_in_any_order_are_what_they_were() -> None:
    down, inner, gates, _ = case(0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(narrowed(down, moment(inner, gates), order, 0.0), down[:, order])
    assert torch.equal(refit(down @ moment(inner, gates), moment(inner, gates), down, 0.5), down)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_ridged_error_is_zero_and_the_error_grows_with_the_ridge(seed: int) -> None:
    down, inner, gates, kept = case(seed)
    c = moment(inner, gates)
    errors = [error(down, inner, gates, kept, down[:, kept])]
    for ridge in (1e9, 1.0, 1e-1, 1e-3, 0.0):
        made = narrowed(down, c, kept, ridge).requires_grad_()
        lam = max(ridge, 1e-12) * c[kept][:, kept].diagonal().mean()
        gap = (inner @ down.T - inner[:, kept] @ made.T) * gates[:, None]
        gap.square().sum().add(lam * (made - down[:, kept]).square().sum()).backward()
        assert made.grad is not None
        assert float(made.grad.abs().max()) < 1e-6 * max(1.0, float(lam))
        errors.append(error(down, inner, gates, kept, made.detach()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] == pytest.approx(errors[0], rel=1e-6), "an endless ridge leaves everything as it was"


def test_scaled_gates_change_nothing() -> None:
    down, inner, gates, kept = case(5)
    one, two = (narrowed(down, moment(inner, gates * scale), kept, 1e-2) for scale in (1.0, 37.0))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_it_is_the_general_solution_for_kept_neurons() -> None:
    """And of another gate and up: h~ need not be a part of h."""
    down, inner, gates, kept = case(6)
    other = inner[:, kept] + 0.1
    weighed = gates[:, None] ** 2
    cross, own = (inner @ down.T * weighed).T @ other, (other * weighed).T @ other
    made = refit(cross, own, down[:, kept], 0.0)
    wanted = torch.linalg.lstsq(other * gates[:, None], inner @ down.T * gates[:, None]).solution.T
    torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-8)
    c = moment(inner, gates)
    cross, own = down @ c[:, kept], c[kept][:, kept]
    torch.testing.assert_close(refit(cross, own, down[:, kept], 1e-2), narrowed(down, c, kept, 1e-2))


def test_what_no_token_says_anything_about_stays() -> None:
    down, inner, gates, kept = case(7)
    assert torch.equal(narrowed(down, torch.zeros(9, 9).double(), kept, 1e-2), down[:, kept])
    inner = inner.clone()
    inner[:, 7] = 0  # a neuron that never fires
    made = narrowed(down, moment(inner, gates), kept, 1e-2)
    assert torch.equal(made[:, 0], down[:, 7])
    assert torch.equal(narrowed(down, moment(inner, gates), kept[:0], 1e-2), down[:, :0])


def test_fewer_tokens_than_neurons_are_no_obstacle() -> None:
    down, inner, gates, kept = case(8, tokens=2)
    for dtype in (torch.float64, torch.float32):
        c = moment(inner, gates).to(dtype)
        made = narrowed(down.to(dtype), c, kept, 0.0)
        assert bool(made.isfinite().all())
        assert squared_error(down, c, kept, made) <= squared_error(down, c, kept, down[:, kept].to(dtype)) * (1 + 1e-5)
