"""Adapters on stacked experts change what their formula says, merge back, and survive saving."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from moekit.anatomy import find_moe_layers
from moekit.errors import BadConfig
from moekit.experts.methods.factored import Factored
from moekit.runtime import attach
from moekit.training import MoECallback
from moekit.training.freeze import train_only
from moekit.training.layers import moe_layers
from moekit.training.lora import LoraSettings, add_lora, merge_lora
from tests.families import EXPERTS, FAMILIES, HIDDEN, WIDTH, build, logits, tokens
from tests.unit.training.helpers import Rows, trainer


def stir(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_wrapping_changes_nothing_and_merging_keeps_what_was_learnt(family: str) -> None:
    model = build(family)
    stock = copy.deepcopy(model)
    wrapped = add_lora(model, LoraSettings(rank=2, parts=("experts", "router", "attention")))
    torch.testing.assert_close(logits(wrapped), logits(stock), atol=1e-6, rtol=1e-5)
    stir(wrapped)
    learnt = logits(wrapped)
    assert not torch.allclose(learnt, logits(stock), atol=1e-3)
    merged = merge_lora(wrapped)
    assert type(merged) is type(stock)
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    torch.testing.assert_close(logits(merged), learnt, atol=1e-5, rtol=1e-4)


def test_each_expert_gets_its_own_update_of_the_stated_rank() -> None:
    model = build("qwen2_moe")
    before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    wrapped = add_lora(model, LoraSettings(rank=3, alpha=6.0, parts=("experts:1",)))
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == EXPERTS * 3 * (
        (HIDDEN + 2 * WIDTH) + (WIDTH + HIDDEN)
    )
    stir(wrapped)
    update = merge_lora(wrapped).model.layers[1].mlp.experts.down_proj - before
    assert [int(torch.linalg.matrix_rank(update[e], atol=1e-6)) for e in range(EXPERTS)] == [3] * EXPERTS
    assert not torch.allclose(update[0], update[1], atol=1e-3)


def test_the_saved_adapter_reloads(tmp_path: Path) -> None:
    wrapped = add_lora(build("mixtral"), LoraSettings(rank=2, parts=("experts", "router", "attention")))
    stir(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = PeftModel.from_pretrained(build("mixtral"), tmp_path)
    torch.testing.assert_close(logits(again), logits(wrapped), atol=0, rtol=0)


def test_adapters_train_under_the_callback(tmp_path: Path) -> None:
    plain = build("qwen2_moe")
    wrapped = add_lora(build("qwen2_moe"), LoraSettings(rank=2, parts=("experts", "router")))
    # The wrapped model has the layers of the plain one, wherever peft has put its wrappers.
    assert [layer.index for layer in moe_layers(wrapped)] == [layer.index for layer in find_moe_layers(plain)]
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    run = trainer(wrapped, Rows(8), tmp_path, max_steps=2, learning_rate=0.5)
    callback = MoECallback({"balance": 1.0}).install(run)
    run.train()
    assert callback.figures is not None
    assert all(sum(layer.load) > 0 for layer in callback.figures.layers.values())
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert any("gate.lora_B" in name for name in changed)


def test_freezing_knows_adapters() -> None:
    wrapped = add_lora(build("olmoe"), LoraSettings(rank=2, parts=("experts", "attention")))
    report = train_only(wrapped, ["adapters"])
    assert set(report.trained) == {"adapters"}
    report = train_only(wrapped, ["router", "adapters:0"])
    assert set(report.trained) == {"router", "adapters"}
    training = [name for name, p in wrapped.named_parameters() if p.requires_grad and "lora_" in name]
    assert all(".layers.0." in name for name in training)


@pytest.mark.parametrize("parts", [("norms",), ("embeddings",), ("shared",)])
def test_what_cannot_be_adapted_is_refused(parts: tuple[str, ...]) -> None:
    with pytest.raises(BadConfig):
        add_lora(build("olmoe"), LoraSettings(parts=parts))


@pytest.mark.parametrize(
    ("family", "parts", "hint"),
    [
        ("olmoe", ("shared",), "it has attention, experts, router"),
        ("olmoe", ("experts:40",), "it has attention (layers 0-1), experts (layers 0-1), router (layers 0-1)"),
        ("glm4_moe", ("experts:0",), "attention (layers 0-2), experts (layers 1-2), other (layer 0),"),
    ],
)
def test_the_way_out_names_what_can_be_adapted_and_where(family: str, parts: tuple[str, ...], hint: str) -> None:
    with pytest.raises(BadConfig) as refused:
        add_lora(build(family), LoraSettings(parts=parts))
    assert refused.value.hint is not None
    assert hint in refused.value.hint
    assert "norms" not in refused.value.hint
    assert "embeddings" not in refused.value.hint


def test_generation_works_with_adapters() -> None:
    wrapped = add_lora(build("qwen3_moe"), LoraSettings(rank=2))
    out = wrapped.generate(input_ids=tokens(1, 4), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


def test_wrapping_a_model_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(build("olmoe"), LoraSettings())


def test_adapters_on_experts_that_a_part_computes_are_refused_and_others_are_not() -> None:
    model = build("qwen3_moe")
    attach(model, Factored(rank=2))
    with pytest.raises(BadConfig, match="a part beside the weights computes there") as caught:
        add_lora(model, LoraSettings(rank=2))
    assert "attention" in str(caught.value.hint)
    before = logits(model, tokens())
    assert torch.equal(logits(add_lora(model, LoraSettings(rank=2, parts=("attention",))), tokens()), before)
