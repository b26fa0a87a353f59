"""Exactly the named parts train, in every family, and the counts are those of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.anatomy import find_moe_layers
from moekit.errors import BadConfig, UnsupportedModel
from moekit.training.freeze import parts_of, train_only
from moekit.training.part_specs import PARTS
from tests.families import DENSE, EXPERTS, FAMILIES, HIDDEN, SHARED, VOCAB, WIDTH, build
from tests.unit.training.helpers import Rows, trainer


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_parameter_has_the_part_its_place_says(family: str) -> None:
    model = build(family)
    parts = parts_of(model)
    assert set(parts) == {name for name, _ in model.named_parameters()}
    assert set(parts.values()) <= set(PARTS)
    layers = find_moe_layers(model)
    for layer in layers:
        for name, _ in layer.experts.named_parameters():
            assert parts[f"{layer.experts_name}.{name}"] == "experts"
        for name, _ in layer.require_router().named_parameters():
            assert parts[f"{layer.router_name}.{name}"] == "router"
    assert parts["lm_head.weight"] == parts["model.embed_tokens.weight"] == "embeddings"
    assert parts["model.norm.weight"] == "norms"
    projections = [name for name in parts if "self_attn" in name and "proj" in name]
    assert projections
    assert all(parts[name] == "attention" for name in projections)
    assert ("shared" in parts.values()) == any(layer.shared for layer in layers)
    assert ("other" in parts.values()) == (len(layers) < model.config.num_hidden_layers)


def test_counts_by_hand() -> None:
    report = train_only(build("qwen2_moe"), ["router", "shared"])
    assert report.trained == {"router": 2 * EXPERTS * HIDDEN, "shared": 2 * (3 * SHARED * HIDDEN + HIDDEN)}
    assert report.frozen["experts"] == 2 * EXPERTS * 3 * WIDTH * HIDDEN
    assert report.frozen["embeddings"] == 2 * VOCAB * HIDDEN
    assert report.parameters == sum(p.numel() for p in build("qwen2_moe").parameters())
    dense = train_only(build("glm4_moe"), ["other"])
    assert dense.trained == {"other": 3 * DENSE * HIDDEN}


def test_layer_ranges() -> None:
    model = build("deepseek_v3")  # layer 0 is dense, 1 and 2 are MoE
    report = train_only(model, ["experts:2", "norms:0-1"])
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in training if "experts" in name} == {
        "model.layers.2.mlp.experts.gate_up_proj",
        "model.layers.2.mlp.experts.down_proj",
    }
    assert all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in training if "norm" in name)
    assert "model.norm.weight" not in training
    assert set(report.trained) == {"experts", "norms"}


def test_selection_biases_never_train_by_gradient() -> None:
    model = build("ernie4_5_moe")
    train_only(model, ["all"])
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {f"model.layers.{i}.mlp.gate.moe_statics.e_score_correction_bias" for i in (1, 2)}


def test_only_the_given_part_changes_in_training(tmp_path: Path) -> None:
    model = build("qwen2_moe")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_only(model, ["router"])
    trainer(model, Rows(4), tmp_path, max_steps=2).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"}


@pytest.mark.parametrize("text", ["expert", "experts:", "experts:3-1", "router:x", "", "shared:1-2-3"])
def test_what_names_no_part_is_refused(text: str) -> None:
    with pytest.raises(BadConfig):
        train_only(build("qwen2_moe"), [text])


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(BadConfig, match="nothing trains: shared"):
        train_only(build("olmoe"), ["shared"])
    with pytest.raises(BadConfig, match="nothing trains"):
        train_only(build("olmoe"), [])


def test_a_dense_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedModel):
        train_only(LlamaForCausalLM(config), ["all"])
