"""Outputs of single experts, inputs, router scores and the residual stream, against slow references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moekit.anatomy import find_moe_layers
from moekit.trace import Recorder, record
from moekit.trace.batch import ExpertBatch
from moekit.trace.each_expert import delegated, each_expert, plain_expert
from moekit.trace.seam import uses_sigmoid
from tests.families import EXPERTS, FAMILIES, HIDDEN, TOP_K, build, logits, tokens
from tests.unit.trace.samples import Spy

IDS = [tokens(1, 11, seed=5)[0], tokens(1, 6, seed=6)[0]]
BATCH = {
    "input_ids": torch.stack([IDS[0], torch.cat([IDS[1], torch.full((5,), 99)])]),
    "attention_mask": torch.tensor([[1] * 11, [1] * 6 + [0] * 5]),
}
GROUPS = ("basic", "gates", "inputs", "inner", "outputs", "router")


def reference(family: str) -> dict[int, dict[str, torch.Tensor]]:
    """Sums by loops over tokens and choices, each expert asked about one token at a time."""
    model = build(family)
    seen = Spy(model).run(IDS)
    found = {}
    for layer in find_moe_layers(model):
        hidden_NH, chosen_NK, weights_NK = seen[layer.index]
        sums = {name: torch.zeros(EXPERTS).double() for name in ("output_norm", "output_square", "gated_output_norm")}
        sums |= {name: torch.zeros(EXPERTS, HIDDEN).double() for name in ("output_sum", "input_square", "input_sum")}
        sums["peak"] = torch.zeros(EXPERTS).double()
        for x_H, row, gates in zip(hidden_NH, chosen_NK, weights_NK, strict=True):
            for e, g in zip(row.tolist(), gates.tolist(), strict=True):
                with torch.no_grad():
                    y_H = layer.experts.forward(x_H[None], torch.tensor([[e]]), torch.ones(1, 1))[0].double()
                norm = float(y_H.norm())
                sums["output_norm"][e] += norm
                sums["output_square"][e] += norm**2
                sums["gated_output_norm"][e] += g * norm
                sums["output_sum"][e] += y_H
                sums["input_sum"][e] += x_H
                sums["input_square"][e] += x_H.double() ** 2
                sums["peak"][e] = max(float(sums["peak"][e]), float(y_H.abs().max()))
        found[layer.index] = sums
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_single_outputs_equal_asking_experts_one_token_at_a_time(family: str) -> None:
    expected = reference(family)
    for once in (False, True):
        trace = record(build(family), [BATCH], statistics=GROUPS, once=once)
        assert trace.statistics is not None
        for layer, sums in expected.items():
            stats = trace.statistics[layer]
            for name, value in sums.items():
                got = stats["output_peak"][:, 0] if name == "peak" else stats[name]
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gated_experts_by_their_matrices() -> None:
    """Not through the experts module at all: down(silu(gate x) * up x) from the raw weights."""
    model = build("qwen2_moe")
    seen = Spy(model).run(IDS)
    trace = record(model, [BATCH], statistics=("outputs",))
    assert trace.statistics is not None
    for layer in find_moe_layers(model):
        hidden_NH, chosen_NK, _ = seen[layer.index]
        gate_EIH, up_EIH = layer.experts.gate_up_proj.detach().chunk(2, dim=1)
        expected_E = torch.zeros(EXPERTS).double()
        for x_H, row in zip(hidden_NH, chosen_NK.tolist(), strict=True):
            for e in row:
                inner_I = nn.functional.silu(gate_EIH[e] @ x_H) * (up_EIH[e] @ x_H)
                expected_E[e] += float((layer.experts.down_proj[e].detach() @ inner_I).norm())
        torch.testing.assert_close(trace.statistics[layer.index]["output_norm"], expected_E, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("once", [False, True])
def test_experts_compute_routed_tokens_only(once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    model.set_experts_implementation("eager")
    rows: list[int] = []
    linear = nn.functional.linear

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if any(weight.data_ptr() == p.data_ptr() for layer in layers for p in layer.experts.down_proj):
            rows.append(x.shape[0])
        return linear(x, weight, bias)

    layers = find_moe_layers(model)
    monkeypatch.setattr(nn.functional, "linear", counting)
    record(model, [BATCH], statistics=("outputs",), once=once)
    forward, real = 22 * TOP_K * 2, 17 * TOP_K * 2  # positions of the pass, tokens that are no padding; two layers
    assert sum(rows) == (real if once else forward + real)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hooks_leave_the_output_and_the_implementation_rounds(family: str) -> None:
    model = build(family)
    stock = logits(model)
    with Recorder(model, statistics=("outputs", "residual")):
        assert torch.equal(logits(model), stock)
    with Recorder(model, statistics=("outputs", "residual"), once=True):
        torch.testing.assert_close(logits(model), stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_router_scores_and_logits(family: str) -> None:
    model = build(family)
    gathered: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in find_moe_layers(model)}
    for layer in find_moe_layers(model):
        router = layer.require_router()
        weight, bias = router.weight, getattr(router, "bias", None)
        if family == "granitemoe":
            weight = next(router.parameters())

        def keep(
            module: nn.Module,
            args: tuple[torch.Tensor, ...],
            index: int = layer.index,
            w: torch.Tensor = weight,
            b: torch.Tensor | None = bias,
        ) -> None:
            gathered[index].append(nn.functional.linear(args[0].reshape(-1, HIDDEN).float(), w.float(), b))

        router.register_forward_pre_hook(keep)
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=ids[None], use_cache=False)
    found = {n: torch.cat(parts).detach().double() for n, parts in gathered.items()}
    trace = record(build(family), [BATCH], statistics=("router",))
    assert trace.statistics is not None
    sigmoid = family in ("deepseek_v3", "glm4_moe")
    for layer, logits_NE in found.items():
        stats = trace.statistics[layer]
        scores_NE = logits_NE.sigmoid() if sigmoid else logits_NE.softmax(-1)
        share_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        torch.testing.assert_close(stats["soft_frequency"], scores_NE.sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats["logit_sum"], logits_NE.sum(0), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats["logit_square"], logits_NE.square().sum(0), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats["logit_gram"], logits_NE.T @ logits_NE, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats["score_entropy"], -(share_NE * share_NE.log()).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_recognised(family: str) -> None:
    for layer in find_moe_layers(build(family)):
        assert uses_sigmoid(layer) == (family in ("deepseek_v3", "glm4_moe"))
    for layer in find_moe_layers(build("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False)):
        assert not uses_sigmoid(layer)


@pytest.mark.parametrize(
    ("family", "overrides"), [*((f, {}) for f in sorted(FAMILIES)), ("granitemoe", {"residual_multiplier": 0.5})]
)
def test_the_residual_stream_is_what_the_block_is_added_to(family: str, overrides: dict[str, float]) -> None:
    """Reference: the decoder layer's output, less the block's output, is the stream before the block."""
    model = build(family, **overrides)
    before: dict[int, list[torch.Tensor]] = {}
    routed: dict[int, list[torch.Tensor]] = {}
    scales = {}
    for layer in find_moe_layers(model):
        decoder = model.model.layers[layer.index]
        scale = scales[layer.index] = getattr(decoder, "residual_multiplier", 1.0)
        before[layer.index], routed[layer.index] = [], []
        held: list[torch.Tensor] = []

        def block(module: nn.Module, args: object, output: torch.Tensor, held: list[torch.Tensor] = held) -> None:
            held.append((output[0] if isinstance(output, tuple) else output).detach())

        def whole(
            module: nn.Module,
            args: object,
            output: torch.Tensor,
            held: list[torch.Tensor] = held,
            n: int = layer.index,
            scale: float = scale,
        ) -> None:
            output = output[0] if isinstance(output, tuple) else output
            before[n].append((output.detach() - scale * held.pop().view_as(output)).reshape(-1, HIDDEN))

        def experts(module: nn.Module, args: object, output: torch.Tensor, n: int = layer.index) -> None:
            routed[n].append(output.detach().reshape(-1, HIDDEN))

        layer.block.register_forward_hook(block)
        decoder.register_forward_hook(whole)
        layer.experts.register_forward_hook(experts)
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=ids[None], use_cache=False)
    for once in (False, True):
        trace = record(build(family, **overrides), [BATCH], statistics=("residual",), once=once)
        assert trace.statistics is not None
        for n, parts in before.items():
            h_NH, add_NH = torch.cat(parts), torch.cat(routed[n]) * scales[n]
            change = (1 - nn.functional.cosine_similarity(h_NH, h_NH + add_NH)).clamp_min(0)
            stats = trace.statistics[n]
            torch.testing.assert_close(stats["residual_change"], change.double().sum(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(stats["residual_max"], h_NH.abs().max().double(), rtol=1e-4, atol=1e-4)


def test_identities_between_scores() -> None:
    trace = record(build("qwen3_moe", num_experts_per_tok=1), [BATCH], statistics=("outputs",))
    assert trace.statistics is not None
    for stats in trace.statistics.values():  # one choice, renormalised: the gate is 1
        torch.testing.assert_close(stats["gated_output_norm"], stats["output_norm"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats["gate_mass"], stats["load"].double())
    model = build("mixtral")
    once = record(model, [BATCH], statistics=("outputs",), layers=[1]).statistics
    with torch.no_grad():
        find_moe_layers(model)[1].experts.down_proj[3] *= 2  # type: ignore[index, operator]
    twice = record(model, [BATCH], statistics=("outputs",), layers=[1]).statistics
    assert once is not None
    assert twice is not None
    factor_E = torch.ones(EXPERTS).double()
    factor_E[3] = 2
    torch.testing.assert_close(twice[1]["output_norm"], once[1]["output_norm"] * factor_E, rtol=1e-5, atol=1e-6)
    assert torch.equal(twice[1]["load"], once[1]["load"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_expert_by_the_plain_formula_is_what_the_experts_module_gives(family: str) -> None:
    layer = find_moe_layers(build(family))[0]
    hidden_TH = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    plain, asked = plain_expert(layer.experts), delegated(layer.experts.forward)
    assert plain is not None
    with torch.no_grad():
        for expert in range(EXPERTS):
            inner_nI, output_nH = plain(expert, hidden_TH)
            torch.testing.assert_close(output_nH, asked(expert, hidden_TH)[1], rtol=1e-5, atol=1e-6)
            assert inner_nI is not None
            assert inner_nI.shape == (5, layer.geometry.width)


def test_no_expert_has_no_output_and_the_gated_sum_is_the_blocks() -> None:
    layer = find_moe_layers(build("mixtral"))[0]
    hidden_TH = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    chosen_TK = torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [5, 1]])
    weights_TK = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    one = plain_expert(layer.experts)
    assert one is not None
    seen: list[ExpertBatch] = []
    with torch.no_grad():
        figures = each_expert(one, hidden_TH, chosen_TK, weights_TK, EXPERTS, look=seen.append, peaks=True, add_up=True)
        layer.experts.config._experts_implementation = "eager"  # the one that skips what is no expert
        expected_TH = layer.experts.forward(hidden_TH, chosen_TK, weights_TK)
    assert [batch.expert for batch in seen] == [0, 1, 5]
    assert bool((figures.norm_NK[chosen_TK == EXPERTS] == 0).all())
    assert bool((figures.norm_NK[chosen_TK < EXPERTS] > 0).all())
    assert figures.output_NH is not None
    torch.testing.assert_close(figures.output_NH, expected_TH, rtol=1e-5, atol=1e-6)
    assert not figures.output_NH[1].any()


def test_inputs_of_the_down_projection_by_the_matrices() -> None:
    model = build("qwen3_moe")
    seen = Spy(model).run(IDS)
    trace = record(model, [BATCH], statistics=("inner_square",))
    assert trace.statistics is not None
    for layer in find_moe_layers(model):
        hidden_NH, chosen_NK, _ = seen[layer.index]
        gate_EIH, up_EIH = layer.experts.gate_up_proj.detach().chunk(2, dim=1)
        expected_EI = torch.zeros(EXPERTS, layer.geometry.width).double()
        for x_H, row in zip(hidden_NH, chosen_NK.tolist(), strict=True):
            for e in row:
                expected_EI[e] += (nn.functional.silu(gate_EIH[e] @ x_H) * (up_EIH[e] @ x_H)).double() ** 2
        torch.testing.assert_close(trace.statistics[layer.index]["inner_square"], expected_EI, rtol=1e-4, atol=1e-7)
