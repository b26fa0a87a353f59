"""Experts dropped in memory: what is left routes as if the others were masked, trains, saves and generates."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moekit
from moekit.anatomy import find_moe_layers
from moekit.anatomy.gate import Gate
from moekit.anatomy.identify import identify_gate
from moekit.anatomy.probe import MoELayer
from moekit.checkpoint.fingerprint import fingerprint_model
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.routing.methods.c2r import C2R, partner_lists
from moekit.runtime import attach
from tests.contracts import families
from tests.families import EXPERTS, FAMILIES, build, logits, tokens

KEEP = (0, 1, 3, 5, 6)
# Two of each of the groups that deepseek_v2 (4), deepseek_v3 (4) and glm4_moe (2) make of 8 experts.
PAIRS = (2, 3, 6, 7)
AUX_LOSS = ["ernie4_5_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    return find_moe_layers(model)


def keeping(model: PreTrainedModel, *kept: tuple[int, ...]) -> dict[int, LayerOutcome]:
    """Decisions for all layers, in turn as given."""
    return {layer.index: LayerOutcome(keep=kept[number % len(kept)]) for number, layer in enumerate(moe_layers(model))}


def masked(model: PreTrainedModel, kept: Mapping[int, LayerOutcome], top_k: int | None = None) -> Tensor:
    """Logits of a copy that has all its experts, but whose routers never see those that are not kept."""
    model = copy.deepcopy(model)
    for layer in moe_layers(model):
        router, stock = layer.require_router(), layer.require_router().forward
        spec = dataclasses.replace(identify_gate(layer), groups=1, top_groups=1)
        gate = Gate(dataclasses.replace(spec, top_k=top_k or spec.top_k), router)
        gone_E = torch.ones(EXPERTS, dtype=torch.bool)
        gone_E[list(kept[layer.index].keep)] = False

        def forward(
            *args: Any, stock: Any = stock, gate: Gate = gate, gone_E: Tensor = gone_E, **kwargs: Any
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE, weights_TK, _ = stock(*args, **kwargs)
            seen_TE = logits_TE.masked_fill(gone_E, float("-inf"))
            # A selection bias is added after the scores: once more, so that it lifts nobody back.
            chosen_TK = gate.choose(gate.selection(seen_TE).masked_fill(gone_E, float("-inf")))
            return seen_TE, gate.weigh(seen_TE, chosen_TK).to(weights_TK.dtype), chosen_TK

        router.forward = forward  # type: ignore[method-assign]
    return logits(model)


@pytest.mark.parametrize("family", families("test_keeping_all_changes_no_bit_and_no_setting"))
def test_keeping_all_changes_no_bit_and_no_setting(family: str) -> None:
    model = build(family)
    stock, config = logits(model), model.config.to_dict()
    changed = change_model(model, keeping(model, tuple(range(EXPERTS))))
    assert changed is model
    assert torch.equal(logits(changed), stock)
    assert changed.config.to_dict() == config


@pytest.mark.parametrize("family", families("test_slicing_equals_masking"))
def test_slicing_equals_masking(family: str) -> None:
    model = build(family)
    for gone in range(EXPERTS):
        outcomes = keeping(model, tuple(e for e in range(EXPERTS) if e != gone))
        sliced = logits(change_model(copy.deepcopy(model), outcomes))
        assert (sliced - logits(model)).abs().max() > 1e-3, "removing any expert must change this model"
        torch.testing.assert_close(sliced, masked(model, outcomes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", families("test_slicing_equals_masking_down_to_as_many_as_are_chosen"))
def test_slicing_equals_masking_down_to_as_many_as_are_chosen(family: str) -> None:
    model = build(family)
    outcomes = keeping(model, (4, 7), (1, 5))
    sliced = logits(change_model(copy.deepcopy(model), outcomes))
    torch.testing.assert_close(sliced, masked(model, outcomes), rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("family", families("test_fewer_choices", set(FAMILIES) - {"phimoe"}))
def test_fewer_choices(family: str) -> None:
    model = build(family)
    outcomes = keeping(model, (2, 5, 7))
    sliced = logits(change_model(copy.deepcopy(model), outcomes, top_k=1))
    torch.testing.assert_close(sliced, masked(model, outcomes, top_k=1), rtol=1e-5, atol=1e-5)


def test_a_router_that_always_chooses_two_refuses_one_choice() -> None:
    model = build("phimoe")
    stock = logits(model)
    with pytest.raises(BadConfig, match="always chooses 2"):
        change_model(model, keeping(model, KEEP), top_k=1)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_equal_groups_go_on_limiting_choices(family: str) -> None:
    """Two groups of four; of each two experts stay. Experts that are gone count for no group."""
    model = build(family, n_group=2, topk_group=1)
    outcomes = keeping(model, PAIRS)
    changed = change_model(copy.deepcopy(model), outcomes, groups="equal")
    assert (changed.config.n_group, changed.config.topk_group) == (2, 1)
    free = change_model(copy.deepcopy(model), outcomes)
    assert (free.config.n_group, free.config.topk_group) == (1, 1)
    assert not torch.allclose(logits(free), logits(changed), atol=1e-3)
    seen: list[Tensor] = []
    for layer in moe_layers(changed):
        layer.require_router().register_forward_hook(lambda _m, _a, answer: seen.append(answer[2]))
    logits(changed)
    assert len(seen) == 2
    assert all(bool((indices_TK // 2 == indices_TK[:, :1] // 2).all()) for indices_TK in seen)


def test_torn_groups_are_refused_with_the_layer() -> None:
    model = build("deepseek_v2")
    with pytest.raises(BadConfig, match="groups") as refused:
        change_model(model, keeping(model, (0, 1, 2, 4)), groups="equal")
    assert refused.value.layer == 1


@pytest.mark.parametrize("family", families("test_weights_router_rows_and_biases_follow"))
def test_weights_router_rows_and_biases_follow(family: str) -> None:
    model = build(family)
    old = {name: t.clone() for name, t in model.state_dict().items()}
    changed = change_model(model, keeping(model, KEEP))
    for name, tensor in changed.state_dict().items():
        counts = [axis for axis, size in enumerate(old[name].shape) if size == EXPERTS and "attn" not in name]
        expected = old[name].index_select(counts[0], torch.tensor(KEEP)) if counts else old[name]
        assert torch.equal(tensor, expected), name
    followed = [name for name in old if name.endswith(("e_score_correction_bias", "router.bias"))]
    assert bool(followed) == (family in {"deepseek_v3", "glm4_moe", "ernie4_5_moe", "gpt_oss"})


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("family", families("test_every_count_in_the_model_is_the_new_one"))
def test_every_count_in_the_model_is_the_new_one(family: str) -> None:
    model = build(family)
    changed = change_model(model, keeping(model, KEEP))
    counts = {
        f"{path}.{name}": value
        for path, module in changed.named_modules()
        for name, value in vars(module).items()
        if "experts" in name and type(value) is int and "shared" not in name and "per_tok" not in name
    }
    assert counts
    assert all(value in {len(KEEP), len(KEEP) + 1} for value in counts.values()), counts
    assert all(layer.geometry.experts == len(KEEP) for layer in moe_layers(changed))


def balance_loss(router_logits: tuple[Tensor, ...], experts: int, top_k: int) -> Tensor:
    """Switch Transformer, equations 4 to 6, over all layers together: E * sum over experts of f * P."""
    probabilities_NE = torch.cat([layer.float().softmax(-1) for layer in router_logits])
    chosen_NE = torch.zeros_like(probabilities_NE).scatter(1, probabilities_NE.topk(top_k, -1).indices, 1.0)
    return experts * (chosen_NE.mean(0) * probabilities_NE.mean(0)).sum()


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("family", AUX_LOSS)
def test_the_balance_loss_counts_what_is_left(family: str, top_k: int | None) -> None:
    model = build(family)
    if family == "phimoe" and top_k:
        with pytest.raises(BadConfig, match="always chooses 2 experts, not 1"):
            change_model(model, keeping(model, KEEP), top_k=top_k)
        return
    changed = change_model(model, keeping(model, KEEP), top_k=top_k)
    answer = changed(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    assert {layer.shape[-1] for layer in answer.router_logits} == {len(KEEP)}
    expected = balance_loss(answer.router_logits, len(KEEP), top_k or 2)
    torch.testing.assert_close(answer.aux_loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(answer.loss)


@pytest.mark.parametrize("family", families("test_what_is_left_trains"))
def test_what_is_left_trains(family: str) -> None:
    model = build(family)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = change_model(model, keeping(model, KEEP)).train()
    assert {name for name, parameter in changed.named_parameters() if parameter.requires_grad} == trained
    changed(input_ids=tokens(), labels=tokens()).loss.backward()
    for layer in moe_layers(changed):
        gradient = layer.experts.down_proj.grad
        assert gradient is not None
        assert bool(gradient.any())


@pytest.mark.parametrize("family", families("test_saved_it_is_a_stock_model"))
def test_saved_it_is_a_stock_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    changed = change_model(model, keeping(model, KEEP))
    moekit.save(changed, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock), logits(changed), rtol=1e-5, atol=1e-5)
    prompt = tokens(1, 5)
    said = changed.generate(prompt, max_new_tokens=6, do_sample=False)
    assert said.shape[1] > 5
    assert torch.equal(stock.generate(prompt, max_new_tokens=6, do_sample=False), said)
    assert fingerprint_model(changed) == Checkpoint.open(tmp_path / "out").fingerprint


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_experts_implementation_goes_on(implementation: str) -> None:
    model = build("qwen3_moe")
    model.set_experts_implementation(implementation)
    outcomes = keeping(model, KEEP)
    expected = masked(model, outcomes)
    changed = change_model(model, outcomes)
    assert changed.config._experts_implementation == implementation
    assert {m.config._experts_implementation for m in changed.modules() if hasattr(m, "config")} == {implementation}
    torch.testing.assert_close(logits(changed), expected, rtol=1e-5, atol=1e-5)


def test_a_rewriting_gets_all_and_gives_what_stays() -> None:
    """Weights of two experts averaged by hand."""
    model = build("olmoe")
    old = {layer.index: layer.experts.down_proj.detach().clone() for layer in moe_layers(model)}

    def halves(index: int, weights: LayerWeights) -> LayerWeights:
        assert torch.equal(weights.down_EHI, old[index])
        return weights.map(lambda t: (t[0::2] + t[1::2]) / 2)

    changed = change_model(model, keeping(model, (0, 2, 4, 6)), halves)
    for layer in moe_layers(changed):
        expected = torch.stack([(old[layer.index][2 * e] + old[layer.index][2 * e + 1]) / 2 for e in range(4)])
        torch.testing.assert_close(layer.experts.down_proj.detach(), expected)


def test_a_rewriting_of_another_number_is_refused() -> None:
    model = build("olmoe")
    stock = logits(model)
    with pytest.raises(BadConfig, match="keeps 5") as refused:
        change_model(model, keeping(model, KEEP), lambda _, weights: weights.select((0, 1)))
    assert refused.value.layer == 0
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("most", [KEEP, tuple(range(EXPERTS))], ids=["both", "one"])
@pytest.mark.parametrize("family", families("test_layers_of_different_sizes"))
def test_layers_of_different_sizes(family: str, most: tuple[int, ...]) -> None:
    """One layer loses experts, or both do: groups are given up in both, as the config knows one setting."""
    model = build(family)
    outcomes = keeping(model, (0, 4, 5), most)
    sliced = change_model(copy.deepcopy(model), outcomes)
    torch.testing.assert_close(logits(sliced), masked(model, outcomes), rtol=1e-5, atol=1e-5)
    assert [layer.geometry.experts for layer in moe_layers(sliced)] == [3, len(most)]
    assert sliced.generate(tokens(1, 5), max_new_tokens=3, do_sample=False).shape[1] > 5


def test_layers_of_different_sizes_have_no_common_balance_loss() -> None:
    model = build("mixtral", output_router_logits=True)
    changed = change_model(model, keeping(model, (0, 4, 5), KEEP))
    assert changed.config.output_router_logits is False
    assert torch.isfinite(changed(input_ids=tokens(), labels=tokens()).loss)


def test_twice_is_once() -> None:
    model = build("deepseek_v3")
    once = change_model(copy.deepcopy(model), keeping(model, (1, 5, 6)))
    twice = change_model(copy.deepcopy(model), keeping(model, KEEP))
    change_model(twice, keeping(twice, (1, 3, 4)))
    assert torch.equal(logits(once), logits(twice))
    uneven = change_model(copy.deepcopy(model), keeping(model, (1, 5, 6), KEEP))
    layers = [layer.index for layer in moe_layers(uneven)]
    change_model(uneven, {layers[0]: LayerOutcome(keep=(0, 1, 2)), layers[1]: LayerOutcome(keep=(1, 3, 4))})
    assert torch.equal(logits(uneven), logits(once))
    assert uneven.config.n_routed_experts == 3


def test_too_few_experts_are_refused_with_the_layer_and_the_legal_values() -> None:
    model = build("mixtral")
    stock = logits(model)
    with pytest.raises(BadConfig) as refused:
        change_model(model, keeping(model, KEEP, (4,)))
    assert refused.value.layer == 1
    assert "at least 2" in (refused.value.hint or "")
    assert "--top-k 1" in (refused.value.hint or "")
    with pytest.raises(BadConfig, match="choose"):
        change_model(model, keeping(model, KEEP), top_k=0)
    assert torch.equal(logits(model), stock), "refused before anything changed"


@pytest.mark.parametrize(
    ("outcomes", "layer"),
    [
        ({0: LayerOutcome(keep=KEEP)}, 1),
        ({i: LayerOutcome(keep=KEEP) for i in range(3)}, 2),
        ({0: LayerOutcome(keep=KEEP), 1: LayerOutcome(keep=(0, 8))}, 1),
    ],
    ids=["a layer is not named", "no such layer", "no such expert"],
)
def test_decisions_of_another_model(outcomes: dict[int, LayerOutcome], layer: int) -> None:
    model = build("mixtral")
    with pytest.raises(BadConfig) as refused:
        change_model(model, outcomes)
    assert refused.value.layer == layer


def test_a_routing_policy_must_go_first() -> None:
    model = build("mixtral")
    layer = moe_layers(model)[1]
    attach(model, C2R(top_t=3), {layer.index: {"partners": partner_lists(torch.ones(EXPERTS, EXPERTS))}})
    with pytest.raises(BadConfig, match="C2R is attached") as refused:
        change_model(model, keeping(model, KEEP))
    assert refused.value.layer == 1
    assert "detach" in (refused.value.hint or "")
