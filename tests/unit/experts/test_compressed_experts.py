"""Compressed experts by hand, and what they are before and while they learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import moekit
from moekit.anatomy import Geometry, find_moe_layers
from moekit.errors import BadConfig, UnsupportedModel
from moekit.experts.methods.compressed_experts import CompressedExperts, split
from moekit.runtime import attach, attached
from moekit.runtime.experts import ExpertsInputs
from moekit.runtime.part import LayerInit
from tests.families import build, logits, tokens
from tests.parts import learned, stir
from tests.tiny import write_model, write_text

# Three experts over H = I = 2; the first computes, the others lend vectors.
X = torch.tensor([[1.0, 2.0]])
GATES = torch.tensor([[0.5, 0.3, 0.2]])
GEOMETRY = Geometry(2, 3, 3, 2, 0, True, False, False, True)


class Experts(nn.Module):
    """Expert 0: gate 1, up [[1, 1], [1, -1]], down diag(1, 2); the others must not compute."""

    num_experts = 3
    is_concatenated = True

    def __init__(self) -> None:
        super().__init__()
        into = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
        never = torch.full((4, 2), float("nan"))
        self.gate_up_proj = nn.Parameter(torch.stack([into, never, never]))
        self.down_proj = nn.Parameter(torch.stack([torch.diag(torch.tensor([1.0, 2.0])), never[:2], never[:2]]))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """By the plain formula, the first choice alone."""
        gate, up = (hidden @ self.gate_up_proj[0].T).chunk(2, dim=1)
        return weights * ((self.act_fn(gate) * up) @ self.down_proj[0].T)


def given(part: CompressedExperts, index: list[int], gates: Tensor, values: dict[tuple[str, int], list[float]]) -> Any:
    """What the part sees, with some vectors set."""
    experts = Experts()
    state = part.parameters(LayerInit(0, GEOMETRY, {}, experts, torch.Generator()))
    with torch.no_grad():
        for (name, expert), vector in values.items():
            state[name][expert] = torch.tensor(vector) - 1
    return ExpertsInputs(
        layer=0,
        geometry=GEOMETRY,
        module=experts,
        hidden_TH=X,
        index_TK=torch.tensor([index]),
        weights_TK=gates,
        run=experts.forward,
        learned=state,
    )


VECTORS = {("gate", 1): [1.0, 2.0], ("inner", 2): [2.0, 1.0]}


@pytest.mark.parametrize(("values", "expected"), [(VECTORS, (1.5352, -3.0747)), ({}, (1.0966, -1.7616))])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_the_worked_example(values: Any, expected: tuple[float, float], order: list[int]) -> None:
    # Shares .6 and .4: c1 = (1, 1.6), c2 = (1.4, 1); silu(1, 3.2) = (.7311, 3.0747), up = (3, -1), in any order.
    part = CompressedExperts(main=1, renormalize="topk")
    inputs = given(part, order, GATES[:, order], values)
    for found in (part.compute(inputs), part.reference(inputs)):
        torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)
    # With the weight of all three, 1 in the place of .5, twice as much.
    whole = CompressedExperts(main=1, renormalize="main").compute(inputs)
    torch.testing.assert_close(whole, 2 * torch.tensor([expected]), atol=2e-4, rtol=0)


def test_one_vector_on_the_input() -> None:
    part = CompressedExperts(main=1, mode="input", renormalize="topk")
    inputs = given(part, [0, 1, 2], GATES, {("input", 1): [1.0, 2.0], ("input", 2): [2.0, 1.0]})
    # c = .6 (1, 2) + .4 (2, 1) = (1.4, 1.6), so x becomes (1.4, 3.2); up (4.6, -1.8).
    silu = [1.4 / (1 + math.exp(-1.4)), 3.2 / (1 + math.exp(-3.2))]
    expected = torch.tensor([[0.5 * silu[0] * 4.6, 0.5 * 2 * silu[1] * -1.8]])
    torch.testing.assert_close(part.compute(inputs), expected)


def test_shares_by_hand() -> None:
    index = torch.tensor([[4, 2, 0, 1], [3, 5, 5, 5]])  # 5 is no expert
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.0, 0.0]])
    found = split(index, weights, 2, 5, renormalize=False)
    assert found.main_TM.tolist() == [[2, 1], [3, 5]]
    torch.testing.assert_close(found.weights_TM, torch.tensor([[0.4, 0.3], [0.7, 0.0]]))
    torch.testing.assert_close(found.share_TE, torch.tensor([[2 / 3, 0, 0, 0, 1 / 3], [0.0] * 5]))
    torch.testing.assert_close(split(index, 7 * weights, 2, 5, False).share_TE, found.share_TE)
    whole = split(index, weights, 2, 5, renormalize=True).weights_TM
    torch.testing.assert_close(whole, torch.tensor([[4 / 7, 3 / 7], [0.7, 0.0]]))
    none = split(torch.full((1, 4), 5), torch.zeros(1, 4, dtype=torch.bfloat16), 2, 5, True)
    assert bool(none.weights_TM.isfinite().all() and (none.share_TE == 0).all())


@pytest.mark.parametrize("mode", ["three", "input"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "olmoe", "qwen2_moe", "granitemoe"])
def test_before_training_it_is_the_model_of_fewer_choices(family: str, mode: Any) -> None:
    model, fewer = build(family, num_experts_per_tok=4), build(family, num_experts_per_tok=2)
    fewer.load_state_dict(model.state_dict())
    attach(model, CompressedExperts(mode=mode))
    torch.testing.assert_close(logits(model), logits(fewer), atol=1e-5, rtol=1e-5)


def test_with_all_choices_as_main_ones_it_is_the_stock_model() -> None:
    model = build("qwen3_moe", num_experts_per_tok=4)
    stock = logits(model)
    attach(model, CompressedExperts(main=4))
    stir(model)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("mode", ["three", "input"])
def test_only_experts_that_were_auxiliary_get_gradients(mode: Any) -> None:
    model, chosen = build("qwen3_moe", num_experts_per_tok=4), []
    attach(model, CompressedExperts(mode=mode))
    layer = find_moe_layers(model)[0]
    layer.require_router().register_forward_hook(lambda module, args, answer: chosen.append(answer[1:]))
    ids = tokens(1, 3)
    model(input_ids=ids, labels=ids).loss.backward()
    weights, index = (rows[:-1] for rows in chosen[0])  # nothing is predicted from the last token
    auxiliary = set(index.gather(1, weights.argsort(dim=1)[:, :2]).flatten().tolist())
    assert len(auxiliary) < 8
    for name, parameter in learned(model).items():
        if ".layers.0." in name:
            moved = {e for e in range(8) if bool((parameter.grad[e] != 0).any())}
            assert moved == auxiliary


def test_what_does_not_fit_is_refused() -> None:
    model = build("qwen3_moe")
    with pytest.raises(BadConfig, match="chooses 2 expert"):
        attach(model, CompressedExperts(main=3))
    one = Geometry(2, 3, 1, 2, 0, True, False, False, True)
    with pytest.raises(BadConfig, match="half of them") as refused:
        CompressedExperts().check(one, layer=4)
    assert refused.value.layer == 4
    without_gate = Geometry(2, 3, 2, 2, 0, False, False, False, True)
    with pytest.raises(BadConfig, match="no gate"):
        CompressedExperts().check(without_gate, layer=0)
    CompressedExperts(mode="input").check(without_gate, layer=0)
    with pytest.raises(BadConfig, match="a rank holds"):
        CompressedExperts().check_dealt_out(0)
    CompressedExperts(mode="input").check_dealt_out(0)
    with pytest.raises(UnsupportedModel, match="different inputs"):
        CompressedExperts().parameters(LayerInit(0, GEOMETRY, {}, nn.Linear(2, 2), torch.Generator()))


def test_a_saved_folder_is_trained_with_its_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKIT_HOME", str(tmp_path / "home"))
    write_model(tmp_path / "moe", "qwen3_moe", num_experts_per_tok=4)
    write_text(tmp_path / "text", documents=8)
    model = moekit.load(tmp_path / "moe", device="cpu")
    attach(model, CompressedExperts())
    moekit.save(model, tmp_path / "half", tokenizer=AutoTokenizer.from_pretrained(tmp_path / "moe"))
    settings = {"steps": 2, "seq_len": 32, "batch": 2, "lr": 0.01}
    moekit.train(tmp_path / "half", data=tmp_path / "text", settings=settings, device="cpu", out=tmp_path / "tuned")
    tuned = moekit.load(tmp_path / "tuned", device="cpu")
    assert [a.part for a in attached(tuned)] == [CompressedExperts()]
    assert all(bool((vector != 0).any()) for vector in learned(tuned).values())
