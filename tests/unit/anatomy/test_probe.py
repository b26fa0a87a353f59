"""MoE blocks are found by contract in every family, listed or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from moekit.anatomy import find_moe_layers
from moekit.errors import UnsupportedModel
from tests.families import EXPERTS, FAMILIES, HIDDEN, TOP_K, WIDTH, build

FIRST_DENSE = {"deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"}
SHARED = {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_listed_families(family: str) -> None:
    model = build(family)
    layers = find_moe_layers(model)
    depth = model.config.num_hidden_layers
    assert [layer.index for layer in layers] == list(range(1 if family in FIRST_DENSE else 0, depth))
    for layer in layers:
        shape = layer.geometry
        assert (shape.hidden, shape.experts, shape.top_k, shape.width) == (HIDDEN, EXPERTS, TOP_K, WIDTH)
        assert bool(layer.shared) == bool(shape.shared_width) == (family in SHARED)
        assert model.get_submodule(layer.router_name) is layer.router
        assert model.get_submodule(layer.experts_name) is layer.experts


@pytest.mark.parametrize("family", ["dots1", "flex_olmo", "minimax", "hunyuan_v1_moe"])
def test_families_nobody_listed(family: str) -> None:
    config_class = transformers.CONFIG_MAPPING[family]
    knobs: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
        "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_topk": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    known = config_class()
    config = config_class(**{key: value for key, value in knobs.items() if hasattr(known, key)})
    layers = find_moe_layers(AutoModelForCausalLM.from_config(config))
    assert [layer.index for layer in layers] == [0, 1]
    assert all(layer.router is not None and layer.geometry.top_k == 2 for layer in layers)


def test_a_family_of_ones_own() -> None:
    class Choose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Linear(16, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = self.rows(x)
            weights, indices = logits.softmax(-1).topk(3)
            return logits, weights, indices

    class Crowd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 6
            self.up_proj = nn.Parameter(torch.randn(6, 10, 16))
            self.down_proj = nn.Parameter(torch.randn(6, 16, 10))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chooser, self.crowd = Choose(), Crowd()

    (layer,) = find_moe_layers(nn.ModuleDict({"h": nn.ModuleList([Block()])}))
    assert (layer.router_name, layer.experts_name) == ("h.0.chooser", "h.0.crowd")
    assert (layer.geometry.top_k, layer.geometry.width, layer.geometry.has_gate) == (3, 10, False)


def test_a_dense_model_is_refused_and_told_what_was_looked_for() -> None:
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    with pytest.raises(UnsupportedModel, match="num_experts"):
        find_moe_layers(AutoModelForCausalLM.from_config(config))


def test_looking_moves_neither_random_state_nor_mode_nor_hooks() -> None:
    model = build("mixtral").train()
    calls = []
    router = find_moe_layers(model)[0].require_router()
    router.register_forward_hook(lambda *a: calls.append(a))
    before = torch.random.get_rng_state()
    find_moe_layers(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert router.training
    assert not calls


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    assert all(layer.router is not None for layer in find_moe_layers(model))
