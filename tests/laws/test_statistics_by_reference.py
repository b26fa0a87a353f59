"""Law: every source shows what a plain slow loop in fp64 finds."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from moekit.anatomy import find_moe_layers
from moekit.trace import record
from moekit.trace.batch import ExpertBatch, TokenBatch
from moekit.trace.sources.all_experts import all_outputs
from moekit.trace.vocabulary import expert_statistic, known_statistics, statistic
from tests.laws.recorded import FAMILIES, IDS_BS, batch, fresh, model, whole
from tests.laws.reference import LayerSeen, inner_of, output_of, seen, summed_loss

# Norms, rotary embedding and routers of stock code round to fp32 whatever the model is in.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@cache
def reference(family: str) -> dict[int, LayerSeen]:
    with torch.no_grad():
        return seen(family)[1]


@pytest.fixture
def own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics declared in a test are gone after it."""
    monkeypatch.setattr("moekit.trace.vocabulary._statistics", dict(known_statistics()))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_outputs(family: str) -> None:
    for index, shown in reference(family).items():
        sum_EH, gram_EE = torch.zeros(8, 32).double(), torch.zeros(8, 8).double()
        cosine_EE = torch.zeros(8, 8).double()
        with torch.no_grad():
            for x_H in shown.hidden_NH:
                made = [output_of(family, shown.layer, e, inner_of(family, shown.layer, e, x_H)) for e in range(8)]
                for e in range(8):
                    sum_EH[e] += made[e]
                    for f in range(8):
                        gram_EE[e, f] += made[e] @ made[f]
                        cosine_EE[e, f] += made[e] @ made[f] / (made[e].norm() * made[f].norm())
        torch.testing.assert_close(whole(family)[index]["all_output_sum"], sum_EH, **CLOSE)
        torch.testing.assert_close(whole(family)[index]["all_output_gram"], gram_EE, **CLOSE)
        torch.testing.assert_close(whole(family)[index]["all_output_cosine"], cosine_EE, **CLOSE)


def test_all_outputs_come_in_chunks_of_a_limited_size() -> None:
    hidden_NH = torch.arange(10.0).view(5, 2)
    tokens = TokenBatch(3, torch.zeros(5, 1, dtype=torch.int64), hidden=hidden_NH, position=torch.arange(5))
    parts = list(all_outputs(lambda expert, x_nH: (None, x_nH * expert), tokens, limit=2 * 3 * 2 * 4))
    assert [part.tokens for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.position_N for part in parts]), torch.arange(5))
    assert torch.equal(torch.cat([part.all_outputs_NEH for part in parts])[:, 2], hidden_NH * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_moments(family: str) -> None:
    for index, shown in reference(family).items():
        inputs_EHH, inner_EII = torch.zeros(8, 32, 32).double(), torch.zeros(8, 24, 24).double()
        gated_EII, size_EI = torch.zeros(8, 24, 24).double(), torch.zeros(8, 24).double()
        with torch.no_grad():
            rows = zip(shown.hidden_NH, shown.chosen_NK.tolist(), shown.weights_NK.tolist(), strict=True)
            for x_H, row, gates in rows:
                for e, gate in zip(row, gates, strict=True):
                    inner_I = inner_of(family, shown.layer, e, x_H)
                    inputs_EHH[e] += torch.outer(x_H, x_H)
                    inner_EII[e] += torch.outer(inner_I, inner_I)
                    gated_EII[e] += gate * gate * torch.outer(inner_I, inner_I)
                    size_EI[e] += inner_I.abs()
        torch.testing.assert_close(whole(family)[index]["input_moment"], inputs_EHH, **CLOSE)
        torch.testing.assert_close(whole(family)[index]["inner_moment"], inner_EII, **CLOSE)
        torch.testing.assert_close(whole(family)[index]["gated_inner_moment"], gated_EII, **CLOSE)
        torch.testing.assert_close(whole(family)[index]["inner_size"], size_EI, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_and_layer(family: str) -> None:
    def cosine(a_NH: Tensor, b_NH: Tensor) -> float:
        return sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(a_NH, b_NH, strict=True))

    for index, shown in reference(family).items():
        stats = whole(family)[index]
        (given_NH, made_NH), (before_NH, after_NH) = shown.block, shown.decoder
        assert float(stats["block_cosine"]) == pytest.approx(cosine(given_NH, made_NH), abs=1e-7)
        assert float(stats["layer_cosine"]) == pytest.approx(cosine(before_NH, after_NH), rel=1e-7)
        # Between attention and block the stream is what the layer gives, less the block's part.
        between_NH = after_NH - made_NH
        assert float(stats["block_residual_cosine"]) == pytest.approx(cosine(between_NH, after_NH), rel=1e-7)
        assert float(stats["attention_cosine"]) == pytest.approx(cosine(before_NH, between_NH), rel=1e-7)
        assert float(stats["block_output_norm"]) == pytest.approx(sum(float(m.norm()) for m in made_NH), rel=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_attention_is_what_stock_code_gives_out(family: str, chosen: str) -> None:
    """`output_attentions` of the family's own eager attention, against what is computed from queries and keys."""
    stock, ours = fresh(family), fresh(family)
    stock.set_attn_implementation("eager")
    if family != "gpt_oss":  # has eager attention only
        ours.set_attn_implementation(chosen)
    padded = batch([0, 1], cut=6, padded=3)
    found = record(ours, [padded, batch([2])], statistics=("attention_mass", "attention_peak")).statistics
    assert found is not None
    with torch.no_grad():
        first = stock(input_ids=IDS_BS[:2, :6], use_cache=False, output_attentions=True).attentions
        second = stock(input_ids=IDS_BS[2:3], use_cache=False, output_attentions=True).attentions
        chosen_by = seen(family, IDS_BS[:2, :6])[1], seen(family, IDS_BS[2:3])[1]
    for index, stats in found.items():
        paid = [part[index].mean(1).sum(1) for part in (first, second)]  # mean over heads, column sums
        mass_E = torch.zeros(8).double()
        for part, paid_BS in zip(chosen_by, paid, strict=True):
            for row, amount in zip(part[index].chosen_NK.tolist(), paid_BS.flatten().tolist(), strict=True):
                for expert in row:
                    mass_E[expert] += amount
        torch.testing.assert_close(stats["attention_mass"], mass_E, rtol=1e-5, atol=1e-7)
        assert float(stats["attention_peak"]) == pytest.approx(max(float(p.max()) for p in paid), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_neurons_are_those_of_stock_autograd(family: str) -> None:
    """Zeroing a neuron: sum over its column of the down projection of w dL/dw, by one stock backward pass."""
    stock = fresh(family)
    summed_loss(stock).backward()
    for layer in find_moe_layers(stock):
        down = layer.experts.down_proj
        product = (down * down.grad).detach()
        expected_EI = product.sum(2 if family == "gpt_oss" else 1)
        found = whole(family)[layer.index]
        torch.testing.assert_close(found["neuron_taylor"], expected_EI, rtol=1e-5, atol=1e-8)
    assert all(parameter.grad is None for parameter in model(family).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_weights_are_those_of_stock_autograd(family: str, own_statistics: None) -> None:
    @expert_statistic(shape="EHI", sources=("weight_gradients",))
    def down_gradient(batch: ExpertBatch) -> Tensor:
        """Gradient of the down projection, as [H, I]."""
        gradient = batch.weight_gradients["down_proj"]
        return gradient.T if gradient.shape == (24, 32) else gradient

    @expert_statistic(shape="E", sources=("weight_gradients",))
    def first_gradient_sum(batch: ExpertBatch) -> Tensor:
        """Sum over gate and up projection's gradients, and over their biases'."""
        return sum((g.sum() for n, g in batch.weight_gradients.items() if n != "down_proj"), torch.zeros(()))

    stock = fresh(family)
    summed_loss(stock).backward()
    ours = fresh(family).requires_grad_(False)  # a frozen model shows them too
    found = record(ours, [batch(range(4))], statistics=("down_gradient", "first_gradient_sum")).statistics
    assert found is not None
    for layer in find_moe_layers(stock):
        gradient = layer.experts.down_proj.grad
        expected_EHI = gradient.transpose(1, 2) if family == "gpt_oss" else gradient
        torch.testing.assert_close(found[layer.index]["down_gradient"], expected_EHI, rtol=1e-5, atol=1e-8)
        others = [p.grad for name, p in layer.experts.named_parameters() if name != "down_proj"]
        expected_E = sum(g.flatten(1).sum(1) for g in others)
        torch.testing.assert_close(found[layer.index]["first_gradient_sum"], expected_E, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_after_a_layer(family: str) -> None:
    stock, made = fresh(family), {}
    for index, decoder in enumerate(stock.model.layers):
        forward = decoder.forward

        def wrapped(*args: object, n: int = index, f: object = forward, **kwargs: object) -> object:
            output = f(*args, **kwargs)  # type: ignore[operator]
            tensor = output[0] if isinstance(output, tuple) else output
            tensor.retain_grad()
            made.setdefault(n, []).append(tensor)
            return output

        decoder.forward = wrapped
    summed_loss(stock).backward()
    for index, stats in whole(family).items():
        expected_H = sum(t.grad.square().sum((0, 1)) for t in made[index])
        torch.testing.assert_close(stats["stream_gradient_square"], expected_H, rtol=1e-5, atol=1e-9)


def test_any_module_of_a_layer_by_its_path(own_statistics: None) -> None:
    @statistic(shape="", sources=("module:post_attention_layernorm",))
    def norm_change(tokens: TokenBatch) -> Tensor:
        """Sum over tokens of the squared change by the norm before the block."""
        given_NH, made_NH = tokens.module("post_attention_layernorm")
        return (made_NH - given_NH).square().sum()

    found = record(model("qwen3_moe"), [batch(range(4))], statistics=("norm_change",)).statistics
    assert found is not None
    for index, shown in reference("qwen3_moe").items():
        stream_NH = shown.decoder[1] - shown.block[1]
        norm: nn.Module = model("qwen3_moe").model.layers[index].post_attention_layernorm
        with torch.no_grad():
            expected = (norm(stream_NH) - stream_NH).square().sum()
        torch.testing.assert_close(found[index]["norm_change"], expected, rtol=1e-6, atol=1e-9)
