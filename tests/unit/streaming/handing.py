"""Tiny models whose layers hand on more than one hidden state [B, S, H], and a loader that has all layers in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from moekit.streaming.walk import Inputs
from tests.families import DENSE, EXPERTS, HIDDEN, TOP_K, VOCAB, WIDTH, _common, _latent_attention, tokens

LAYERS = 4


def _glm_moe_dsa() -> Any:
    config = transformers.GlmMoeDsaConfig(
        **{**_latent_attention(), "num_hidden_layers": LAYERS, "n_group": 1, "topk_group": 1},
        index_topk=3,
        index_head_dim=8,
        index_n_heads=2,
        mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)],
        indexer_types=["full", "shared", "full", "shared"],
    )
    return transformers.GlmMoeDsaForCausalLM(config)


def _hy_v4() -> Any:
    config = transformers.HYV4Config(
        **{**_latent_attention(), "num_hidden_layers": LAYERS, "n_group": 1, "topk_group": 1},
        head_dim=4,
        index_topk=3,
        index_head_dim=8,
        index_n_heads=2,
        mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)],
        layer_types=["indexed_attention"] * LAYERS,
        indexer_types=["full", "shared", "full", "shared"],
        hc_mult=3,
    )
    return transformers.HYV4ForCausalLM(config)


def _qwen4_exp() -> Any:
    config = transformers.Qwen4ExpTextConfig(
        **_common(LAYERS),
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        layer_types=["linear_attention", "indexed_attention"] * 2,
        hc_count=3,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
        ple_layer_ids=[1],
        ple_embed_dim=16,
        ngram_size=2,
        heads_per_ngram=2,
        ngram_vocab_size_base=64,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
    )
    return transformers.Qwen4ExpForCausalLM(config)


def _deepseek_v4() -> Any:
    config = transformers.DeepseekV4Config(
        **{**_common(LAYERS), "num_key_value_heads": 1},
        head_dim=16,
        q_lora_rank=16,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        hc_mult=3,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=3,
    )
    return transformers.DeepseekV4ForCausalLM(config)


def _gemma4() -> Any:
    config = transformers.Gemma4TextConfig(
        **_common(LAYERS),
        head_dim=8,
        intermediate_size=DENSE,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=6,
        num_kv_shared_layers=2,
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=TOP_K,
        moe_intermediate_size=WIDTH,
        final_logit_softcapping=20.0,
    )
    return transformers.Gemma4ForCausalLM(config)


def _qwen3_vl_moe() -> Any:
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            **_common(LAYERS),
            "head_dim": 16,
            "intermediate_size": DENSE,
            "moe_intermediate_size": WIDTH,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=WIDTH,
        num_layers=3,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=EXPERTS,
        expert_capacity=4,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def _nllb() -> Any:
    config = transformers.NllbMoeConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=3,
        decoder_layers=2,
        encoder_ffn_dim=WIDTH,
        decoder_ffn_dim=WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_experts=EXPERTS,
        expert_capacity=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "glm_moe_dsa": _glm_moe_dsa,
    "hy_v4": _hy_v4,
    "qwen4_exp": _qwen4_exp,
    "deepseek_v4": _deepseek_v4,
    "gemma4": _gemma4,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "switch_transformers": _switch,
    "nllb_moe": _nllb,
}
# Families whose later layers need only what the one before answered.
ONLY_ANSWERS = {"glm_moe_dsa", "hy_v4", "qwen4_exp", "deepseek_v4", "qwen3_vl_moe"}


def made(name: str) -> Any:
    """A model of a family, with weights that differ from 0 everywhere."""
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def batches(name: str, model: Any) -> list[Inputs]:
    """Two batches of unequal length, the first with padding; what else the family takes."""
    found = []
    for seed, (rows, length) in enumerate(((2, 12), (1, 7), (3, 12))):
        ids = tokens(rows, length, seed=seed).clamp(3, VOCAB - 6)
        mask = torch.ones_like(ids)
        more: dict[str, Any] = {}
        if seed == 0:
            mask[1, 9:] = 0
        if model.config.is_encoder_decoder:
            more = {"decoder_input_ids": tokens(rows, 5, seed=9 + seed), "decoder_attention_mask": mask[:, :5]}
        if name == "qwen3_vl_moe" and seed == 2:
            more = _image(ids)
        found.append(Inputs(ids, mask, more.copy))
    return found


def _image(ids: torch.Tensor) -> dict[str, Any]:
    """One picture of 2 x 2 patches after merging in the first row."""
    kinds = torch.zeros_like(ids)
    ids[0, 1], ids[0, 2:6], ids[0, 6] = VOCAB - 3, VOCAB - 1, VOCAB - 4
    kinds[0, 2:6] = 1
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds.int()}


class InMemory:
    """A loader whose layers are all there; encoder layers come before decoder layers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        stacks = (
            [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model.get_decoder()]
        )
        self.decoder = stacks[-1]
        self.units: list[nn.Module] = [layer for stack in stacks for layer in _stack(stack)]
        self.layers = len(self.units)

    def layer(self, index: int) -> nn.Module:
        return self.units[index]

    def load_rest(self) -> None: ...

    def release_rest(self) -> None: ...


def _stack(stack: Any) -> nn.ModuleList:
    layers = getattr(stack, "layers", None)
    return stack.block if layers is None else layers
