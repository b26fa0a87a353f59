"""Where gates differ only at the edge: ties, underflow, and constraints stronger than expert groups.

Legend: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.anatomy import Gate, find_moe_layers, identify_gate
from moekit.routing import C2R
from tests.families import EXPERTS, FAMILIES, build
from tests.routing import routed


def gate_of(family: str, **changes: object) -> Gate:
    layer = find_moe_layers(build(family, **changes))[-1]
    return Gate(identify_gate(layer), layer.require_router())


def constrained(gate: Gate, logits_TE: Tensor, allowed_EE: Tensor) -> tuple[Tensor, Tensor]:
    first_T = gate.first(gate.selection(logits_TE))
    return first_T, gate.choose_allowed(logits_TE, first_T, allowed_EE[first_T])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_first_choice_is_chosen_where_scores_tie(family: str) -> None:
    gate = gate_of(family)
    generator = torch.Generator().manual_seed(0)
    # Four values for eight experts: hardly a row without ties; the last rows tie everywhere.
    logits_TE = torch.randint(0, 4, (400, EXPERTS), generator=generator).float()
    logits_TE[-50:] = logits_TE[-50:, :1]
    allowed_EE = torch.rand(EXPERTS, EXPERTS, generator=generator) < 0.5
    allowed_EE |= torch.eye(EXPERTS, dtype=torch.bool) | torch.eye(EXPERTS, dtype=torch.bool).roll(1, 1)
    first_T, chosen_TK = constrained(gate, logits_TE, allowed_EE)
    best_T = gate.selection(logits_TE).max(dim=1).values
    assert torch.equal(gate.selection(logits_TE).gather(1, first_T[:, None]).squeeze(1), best_T)
    assert bool((chosen_TK == first_T[:, None]).any(dim=1).all())
    assert bool(allowed_EE[first_T].gather(1, chosen_TK).all())
    assert all(len(set(row)) == len(row) for row in chosen_TK.tolist())
    _, free_TK = constrained(gate, logits_TE, torch.ones(EXPERTS, EXPERTS, dtype=torch.bool))
    assert torch.equal(free_TK, gate.choose(gate.selection(logits_TE)))


def test_experts_outside_a_tokens_groups_fill_up_by_score() -> None:
    """DeepSeek-V3 with 4 groups of 4: the constraint leaves expert 0 and experts of other groups only."""
    gate = gate_of("deepseek_v3", n_routed_experts=16, num_experts_per_tok=4)
    gate.router.e_score_correction_bias.zero_()  # type: ignore[operator, union-attr]
    logits_TE = torch.full((1, 16), -4.0)
    logits_TE[0, [0, 1, 4, 5]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    logits_TE[0, 8:12] = torch.tensor([-3.0, -2.0, -1.0, 0.0])
    logits_TE[0, 12:16] = torch.tensor([-3.5, -2.5, -1.5, -0.5])
    devices = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    _, chosen_TK = constrained(gate, logits_TE, devices[:, None] == devices)
    assert sorted(chosen_TK[0].tolist()) == [0, 10, 11, 14]
    # One expert of the token's own groups is allowed: it comes before a better one outside.
    devices[7] = 0
    _, chosen_TK = constrained(gate, logits_TE, devices[:, None] == devices)
    assert sorted(chosen_TK[0].tolist()) == [0, 7, 10, 11]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_that_underflow_are_weighed_like_the_router(family: str) -> None:
    model = build(family)
    layer = find_moe_layers(model)[-1]
    router = layer.require_router()
    gate = Gate(identify_gate(layer), router)
    with torch.no_grad():
        matrix = next(p for p in router.parameters() if p.dim() == 2 and p.shape[0] == EXPERTS)
        matrix.copy_(-matrix.abs())
        hidden_TH = torch.rand(100, layer.geometry.hidden) * torch.logspace(0, 3, 100)[:, None]
        logits_TE, weights_TK, indices_TK = router(hidden_TH)
        ours_TK, chosen_TK = gate(logits_TE)
    assert torch.equal(chosen_TK, indices_TK)
    torch.testing.assert_close(ours_TK.to(weights_TK.dtype), weights_TK, rtol=0, atol=0, equal_nan=True)


def test_a_group_limited_sigmoid_gives_zero_not_nan() -> None:
    """All chosen sigmoids are 0: stock adds 1e-20 to their sum and answers 0 (DeepSeek-V3)."""
    gate = gate_of("deepseek_v3")
    weights_TK, _ = gate(torch.full((1, EXPERTS), -128.0))
    assert weights_TK.tolist() == [[0.0, 0.0]]


def test_device_mode_keeps_the_first_choices_device_where_devices_tie() -> None:
    gate = gate_of("mixtral")
    policy = C2R(mode="device")
    devices = torch.tensor([0, 1] * (EXPERTS // 2))
    logits_TE = torch.randint(0, 2, (200, EXPERTS), generator=torch.Generator().manual_seed(1)).float()
    _, chosen_TK = routed(policy, gate, logits_TE, {"devices": devices})
    first_T = gate.first(gate.selection(logits_TE))
    assert torch.equal(devices[chosen_TK], devices[first_T][:, None].expand_as(chosen_TK))
