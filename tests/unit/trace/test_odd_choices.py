"""What tokens choose is recorded where a block does not hand it to its experts, and nothing of the model changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts, NllbMoeSparseMLP
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from moekit.anatomy import find_moe_layers
from moekit.errors import UnsupportedModel
from moekit.trace import Trace, record
from moekit.trace.seam import see_choices
from tests.families import EXPERTS, HIDDEN, TOP_K, logits, tokens
from tests.odd_families import build

IDS = tokens(2, 12)


def seen(model: Any, path: str) -> tuple[Tensor, Any]:
    """What a module is given, as rows, and answers in a forward pass."""
    found: list[tuple[Tensor, Any]] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, answer: found.append((args[0].reshape(-1, args[0].shape[-1]), answer))
    )
    logits(model, IDS)
    handle.remove()
    return found[0]


def recorded(model: Any, *statistics: str) -> Trace:
    before = logits(model, IDS)
    trace = record(model, [IDS], statistics=("load", *statistics), keep_choices=True, weights=True)
    assert torch.equal(logits(model, IDS), before), "a recorded model is left as it was"
    return trace


def chosen(trace: Trace, layer: int = 0) -> list[set[int]]:
    return [set(row) for row in trace.indices(layer).tolist()]


def test_weights_that_multiply_what_experts_are_given() -> None:
    model = build("llama4_text")
    rows_TH, (scores_TE, logits_TE) = seen(model, "model.layers.0.feed_forward.router")
    trace = recorded(model, "gated_output_norm", "output_norm", "input_norm")
    index_TK = logits_TE.topk(TOP_K).indices
    assert chosen(trace) == [set(row) for row in index_TK.tolist()]
    experts = model.model.layers[0].feed_forward.experts
    added, given = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
    for token, row in enumerate(index_TK.tolist()):
        for expert in row:
            x_H = rows_TH[token] * scores_TE[token, expert]
            gate, up = (x_H @ experts.gate_up_proj[expert]).chunk(2)
            added[expert] += ((up * nn.functional.silu(gate)) @ experts.down_proj[expert]).norm()
            given[expert] += x_H.norm()
    found = trace.require(("gated_output_norm", "input_norm"))[0]
    torch.testing.assert_close(found["gated_output_norm"].float(), added, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["input_norm"].float(), given, rtol=1e-4, atol=1e-5)


def test_gradients_where_weights_multiply_what_experts_are_given() -> None:
    """A neuron's h dL/dh is its down projection's w dL/dw, by one stock backward pass."""
    model = build("llama4_text").double()
    found = record(model, [IDS], statistics=("load", "neuron_taylor")).statistics
    assert found is not None
    scores_BSV = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    (-scores_BSV[:, :-1].gather(-1, IDS[:, 1:, None]).sum()).backward()
    for index, layer in enumerate(model.model.layers):
        down = layer.feed_forward.experts.down_proj
        expected_EI = (down * down.grad).detach().sum(2)
        torch.testing.assert_close(found[index]["neuron_taylor"], expected_EI, rtol=1e-6, atol=1e-9)


def test_tokens_that_a_router_gives_sorted_by_expert() -> None:
    model = build("jetmoe")
    rows_TH, _ = seen(model, "model.layers.0.mlp.router")
    trace = recorded(model, "gated_output_norm")
    block = model.model.layers[0].mlp
    top_TK, index_TK = block.router.layer(rows_TH).topk(TOP_K)
    weights_TK = top_TK.softmax(1)
    assert chosen(trace) == [set(row) for row in index_TK.tolist()]
    expected = torch.zeros(EXPERTS)
    for token, row in enumerate(index_TK.tolist()):
        for slot, expert in enumerate(row):
            gate, up = (rows_TH[token] @ block.input_linear.weight[expert].T).chunk(2)
            made_H = (block.activation(gate) * up) @ block.output_linear.weight[expert].T
            expected[expert] += (weights_TK[token, slot] * made_H).norm()
    found = trace.require(("gated_output_norm",))[0]["gated_output_norm"].float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_token_that_skips_chooses_no_expert() -> None:
    model = build("zaya")
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[:-1] = 0
        layer.mlp.gate.balancing_biases[-1] = 0.3
        layer.mlp.gate.router_mlp.out_proj.weight.data.mul_(3)
    _, answer = seen(model, "model.layers.0.mlp.gate")
    preference_TR = answer[0].softmax(-1) + model.model.layers[0].mlp.gate.balancing_biases
    expected = preference_TR.argmax(-1)
    assert 0 < int((expected == EXPERTS).sum()) < len(expected)
    trace = recorded(model)
    assert trace.indices(0).flatten().tolist() == expected.tolist()
    load_E = trace.require(("load",))[0]["load"]
    assert load_E.tolist() == torch.bincount(expected, minlength=EXPERTS + 1)[:EXPERTS].tolist()


def test_copies_of_the_input_are_no_experts() -> None:
    model = build("longcat_flash")
    _, (_, _, index_TK) = seen(model, "model.layers.0.mlp.router")
    assert 0 < int((index_TK >= EXPERTS).sum()) < index_TK.numel()
    trace = recorded(model, "gated_output_norm")
    assert trace.indices(0).tolist() == index_TK.clamp_max(EXPERTS).tolist()


def test_experts_that_the_token_id_decides() -> None:
    model = build("deepseek_v4")
    table = model.model.layers[0].mlp.gate.tid2eid
    assert len(set(map(tuple, table.tolist()))) > EXPERTS
    trace = recorded(model, "gated_output_norm")
    assert trace.indices(0).tolist() == table[IDS.flatten()].tolist()


def test_a_router_that_gives_logits_alone() -> None:
    model = build("dbrx")
    _, logits_TE = seen(model, "transformer.blocks.0.ffn.router")
    trace = recorded(model, "gated_output_norm")
    assert chosen(trace) == [set(row) for row in logits_TE.topk(TOP_K).indices.tolist()]


def one_block(block: nn.Module) -> tuple[nn.Module, Any]:
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, find_moe_layers(model)[0]


def test_a_mask_over_the_experts_and_a_capacity() -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(d_model=HIDDEN, d_ff=24, num_experts=4, expert_capacity=2, dropout_rate=0.0)
    _, layer = one_block(SwitchTransformersSparseMLP(config).eval())
    assert (layer.seam, layer.storage.kind, layer.geometry.top_k) == ("masks", "listed", 1)
    hidden = torch.randn(2, 7, HIDDEN)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        see_choices(layer, lambda *told: found.append(told))
        output_TH = layer.block(hidden).reshape(-1, HIDDEN)
    [(rows_TH, index_T1, weight_T1)] = found
    best = layer.block.router.classifier(hidden).argmax(-1)
    taken = [[0] * 4 for _ in range(2)]
    for row in range(2):  # the capacity is each sequence's own
        for position in range(7):
            expert = int(best[row, position])
            taken[row][expert] += 1
            told = int(index_T1[row * 7 + position])
            assert told == (expert if taken[row][expert] <= 2 else 4)
    assert 4 in index_T1
    for token, expert in enumerate(index_T1.flatten().tolist()):
        made_H = torch.zeros(HIDDEN) if expert == 4 else layer.experts[f"expert_{expert}"](rows_TH[token])
        torch.testing.assert_close(output_TH[token], weight_T1[token] * made_H, rtol=1e-4, atol=1e-5)


def nllb(dropout: float = 0.0) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    config = NllbMoeConfig(d_model=HIDDEN, num_experts=4, moe_token_dropout=dropout)
    return one_block(NllbMoeSparseMLP(config, 24).eval())


def test_experts_that_do_not_run_what_is_chosen_are_refused_before_they_run() -> None:
    _, layer = nllb()
    assert (layer.seam, layer.storage.kind) == ("misread", "listed")
    # The installed release takes the mask of the first choice for numbers of experts, and runs experts 0 and 1 only.
    hidden = torch.randn(1, 9, HIDDEN)
    with torch.no_grad():
        before = layer.block(hidden)
        for expert in ("expert_2", "expert_3"):
            for parameter in layer.experts[expert].parameters():
                parameter.zero_()
        assert torch.equal(layer.block(hidden), before)
    with pytest.raises(UnsupportedModel, match="does not run the experts that their router chooses"):
        see_choices(layer, lambda *told: None)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_weights_of_all_experts_beside_a_mask_of_the_first(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """As NLLB was trained: a token's output is the sum of both chosen experts' by their weights."""
    monkeypatch.setattr(NllbMoeExperts, "forward", as_trained)
    _, layer = nllb(dropout)
    assert (layer.seam, layer.geometry.top_k) == ("gates", 2)
    hidden = torch.randn(2, 9, HIDDEN)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        see_choices(layer, lambda *told: found.append(told))
        layer.block(hidden)
    [(rows_TH, index_TK, weights_TK)] = found
    scores_TE = layer.block.router.classifier(hidden.reshape(-1, HIDDEN)).softmax(-1)
    best_TK, expected_TK = scores_TE.topk(2)
    assert torch.equal(rows_TH, hidden.reshape(-1, HIDDEN))
    assert index_TK.tolist() == expected_TK.tolist()
    torch.testing.assert_close(weights_TK, best_TK / best_TK.sum(1, keepdim=True))


def as_trained(self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    given = [router_probs[:, [e]] * self[f"expert_{e}"](hidden_states) for e in range(self.num_experts)]
    total: Tensor = torch.stack(given).sum(0) * (1 - self.moe_token_dropout)
    return total


@pytest.mark.parametrize(("family", "statistic"), [("llama4_text", "residual"), ("jetmoe", "residual")])
def test_what_a_block_does_not_show_is_refused(family: str, statistic: str) -> None:
    with pytest.raises(UnsupportedModel, match="unknown") as told:
        record(build(family), [IDS], statistics=(statistic,))
    assert "residual" in str(told.value)
