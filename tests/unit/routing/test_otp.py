"""Learned masks: formulas by hand, all experts at first, and a controller that reaches its mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moekit
from moekit.anatomy import Gate, GateSpec, Geometry
from moekit.errors import BadConfig
from moekit.routing.methods.otp import OTP, Pressure, gumbel_softmax, hard, masked_weights, prefix_mask
from moekit.runtime import attach, attached
from moekit.runtime.router import Routed, RouteInputs
from moekit.training.freeze import train_only
from tests.families import build, logits, tokens
from tests.parts import learned


def test_prefixes_keep_the_strongest() -> None:
    # Keep one with .5, two with .3, three with .2: the first always stays, the second with .5, the third with .2.
    torch.testing.assert_close(prefix_mask(torch.tensor([[0.5, 0.3, 0.2]])), torch.tensor([[1.0, 0.5, 0.2]]))
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert prefix_mask(one_hot).tolist() == [[1, 1, 0], [1, 1, 1]]


def test_the_draw_is_the_formula_and_follows_the_distribution() -> None:
    logits_TK, u_TK = torch.tensor([[0.3, -1.0, 0.5]]), torch.tensor([[0.2, 0.9, 0.5]])
    raised = [
        (z - torch.log(-torch.log(torch.tensor(u)))) / 0.7
        for z, u in zip((0.3, -1.0, 0.5), (0.2, 0.9, 0.5), strict=True)
    ]
    expected = torch.stack(raised).exp() / torch.stack(raised).exp().sum()
    torch.testing.assert_close(gumbel_softmax(logits_TK, u_TK, 0.7)[0], expected)
    assert bool(gumbel_softmax(logits_TK, torch.tensor([[0.0, 1.0, 0.5]]), 0.1).isfinite().all())
    many = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    drawn = hard(gumbel_softmax(logits_TK.expand(20_000, 3), many, 0.5)).mean(0)
    torch.testing.assert_close(drawn, logits_TK[0].softmax(0), atol=0.015, rtol=0)


def test_the_hard_choice_has_the_soft_ones_gradient() -> None:
    soft = torch.tensor([[0.2, 0.5, 0.3]], requires_grad=True)
    taken = hard(soft)
    assert taken.tolist() == [[0, 1, 0]]
    (prefix_mask(taken) * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    # d/d soft_j of the sum over i <= j: 1, 11, 111, though the third expert is masked.
    assert soft.grad is not None
    assert soft.grad.tolist() == [[1, 11, 111]]


def test_weights_of_what_stays() -> None:
    weights, mask = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1.0, 1, 0]])
    plain, scaled = GateSpec(3), GateSpec(3, normalise=True, scale=2.5)
    torch.testing.assert_close(masked_weights(weights, mask, plain), torch.tensor([[0.5, 0.3, 0.0]]))
    torch.testing.assert_close(masked_weights(2.5 * weights, mask, scaled), torch.tensor([[1.5625, 0.9375, 0.0]]))
    whole = torch.rand(50, 3).softmax(1)
    assert torch.equal(masked_weights(whole, torch.ones(50, 3), scaled), whole)


def inputs(part: OTP, scores: torch.Tensor, bias: list[float]) -> tuple[RouteInputs, Routed]:
    geometry = Geometry(4, 3, 3, 8, 0, True, False, False, True)
    gate = Gate(GateSpec(3, normalise=True), nn.Identity())
    state = nn.ParameterDict(
        {
            "input": nn.Parameter(torch.zeros(2, 4)),
            "gates": nn.Parameter(torch.zeros(2, 3)),
            "start": nn.Parameter(torch.zeros(2)),
            "output": nn.Parameter(torch.zeros(3, 2)),
            "bias": nn.Parameter(torch.tensor(bias)),
        }
    ).eval()
    hidden = torch.ones(len(scores), 4)
    made = RouteInputs(gate=gate, logits=scores.log(), hidden_TH=hidden, layer=0, geometry=geometry, learned=state)
    return made, Routed(*gate(scores.log()))


def test_the_likeliest_number_of_experts_stays() -> None:
    given, routed = inputs(OTP(), torch.tensor([[0.2, 0.5, 0.3]]), [0.0, 3.0, 1.0])
    found = OTP().limit(given, routed)
    assert found.indices.tolist() == [[1, 2, 3]]  # two stay; index 3 is no expert
    torch.testing.assert_close(found.weights, torch.tensor([[0.625, 0.375, 0.0]]))


def test_the_network_reads_normalised_states_and_weights_in_falling_order() -> None:
    given, routed = inputs(OTP(), torch.tensor([[0.2, 0.5, 0.3]]), [0.1, 0.2, 0.3])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in given.learned.items():
            if name != "bias":
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    x = torch.tensor([1.0, -2.0, 3.0, 0.5])
    given = RouteInputs(**{**vars(given), "hidden_TH": x[None]})
    own = given.learned
    joined = torch.cat([x / x.square().mean().add(1e-6).sqrt(), torch.tensor([0.5, 0.3, 0.2])])
    inner = torch.cat([own["input"], own["gates"]], dim=1) @ joined + own["start"]
    expected = own["output"] @ (inner * inner.sigmoid()) + own["bias"]
    found = OTP()._logits(given, routed.weights.sort(descending=True).values)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_at_first_nothing_changes(family: str) -> None:
    model = build(family)
    stock = logits(model)
    attach(model, OTP())
    assert torch.equal(logits(model), stock)


def test_one_expert_a_token_is_refused() -> None:
    geometry = Geometry(8, 4, 1, 8, 0, True, False, False, True)
    with pytest.raises(BadConfig, match="one must stay"):
        OTP().check(geometry, 3)
    with pytest.raises(BadConfig, match="less than one"):
        OTP(keep=0.2).check(Geometry(8, 4, 4, 8, 0, True, False, False, True), 3)


def test_the_factor_rises_while_too_many_are_kept_and_falls_to_nothing() -> None:
    pressure = Pressure((0,))
    for kept, integral, factor in ((3.0, 0.1, 0.6), (3.0, 0.2, 0.7), (1.0, 0.1, 0.0), (0.0, 0.0, 0.0)):
        pressure.steer(torch.tensor(kept), 2.0, rate=0.1, gain=0.5)
        assert float(pressure.integral) == pytest.approx(integral)
        assert float(pressure.factor) == pytest.approx(factor)


def test_only_what_is_attached_trains_and_the_mean_comes_down_to_what_is_asked(tmp_path: Path) -> None:
    """Against the model itself, by the divergence of its logits, in a plain loop."""
    model = build("qwen3_moe")
    teacher = copy.deepcopy(model)
    top_k = model.config.num_experts_per_tok
    attach(model, OTP(keep=0.75, width=8, rate=0.02, gain=0.1))
    names = set(learned(model))
    stock = {name: p.detach().clone() for name, p in model.named_parameters() if name not in names}
    report = train_only(model, ("attached",))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert report.trained == {"router": sum(p.numel() for p in learned(model).values())}
    optimizer = torch.optim.AdamW(learned(model).values(), lr=3e-2, weight_decay=0.0)
    kept: list[float] = []
    for step in range(60):
        ids = tokens(4, 16, seed=step)
        model.train()
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        got = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        (wanted.exp() * (wanted - got)).sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(_mean_kept(model, ids) if step >= 50 else top_k)
    assert sum(kept[-10:]) / 10 < 0.95 * top_k
    assert all(torch.equal(p, stock[name]) for name, p in model.named_parameters() if name in stock)
    moekit.save(model, tmp_path / "m")
    back = moekit.load(tmp_path / "m", dtype=torch.float32, device="cpu")
    assert [a.part for a in attached(back)] == [a.part for a in attached(model)]
    again = attached(back)[0].shared
    assert again is not None
    assert float(again.get_buffer("factor")) == float(attached(model)[0].shared.get_buffer("factor")) > 0  # type: ignore[union-attr]


@torch.no_grad()
def _mean_kept(model: Any, ids: torch.Tensor) -> float:
    counts: list[float] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        counts.append(float((output[2] < module.num_experts).sum(1).float().mean()))

    handles = [layer.mlp.gate.register_forward_hook(see) for layer in model.model.layers]
    model.eval()
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sum(counts) / len(counts)
