"""Tiny random multimodal models as they are published: a vision tower, a projector, and a language model of experts.

Use `build_wrapper("qwen3_vl_moe")`, or parametrize over `WRAPPERS`. Towers number their layers as decoders do, and have
other sizes, so that one that is taken for the other cannot pass by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.checkpoints import edit_json
from tests.families import DENSE, EXPERTS, HIDDEN, SHARED, TOP_K, VOCAB, WIDTH, randomize

# Layers of the language model, and of the tower, which has one more.
LAYERS, TOWER_LAYERS = 2, 3


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "num_experts_per_tok": TOP_K,
        **changes,
    }


def _qwen_tower(**changes: Any) -> dict[str, Any]:
    return {
        "depth": TOWER_LAYERS,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        **changes,
    }


def _tower(**changes: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": TOWER_LAYERS,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        **changes,
    }


_IDS = {"image_token_id": 120, "video_token_id": 121}


def _latent_text(model_type: str) -> dict[str, Any]:
    values = _text(
        model_type=model_type,
        intermediate_size=DENSE,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    del values["head_dim"]
    return values


def _qwen3_vl_moe() -> Any:
    text = _text(intermediate_size=DENSE, moe_intermediate_size=WIDTH, num_experts=EXPERTS)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    tower = _qwen_tower(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    return transformers.Qwen3VLMoeConfig(text_config={**text, "rope_parameters": rope}, vision_config=tower, **_IDS)


def _glm4v_moe() -> Any:
    text = _text(
        intermediate_size=DENSE, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, first_k_dense_replace=0
    )
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.5,
    }
    text["rope_parameters"] = rope
    return transformers.Glm4vMoeConfig(text_config=text, vision_config=_qwen_tower(image_size=16), **_IDS)


def _qwen3_5_moe() -> Any:
    text = _text(
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    return transformers.Qwen3_5MoeConfig(
        text_config=text, vision_config=_qwen_tower(num_position_embeddings=16), **_IDS
    )


def _llama4() -> Any:
    text = _text(
        intermediate_size=WIDTH,
        intermediate_size_mlp=DENSE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        attention_chunk_size=64,
        no_rope_layers=[1, 0],
    )
    tower = _tower(vision_output_dim=20, projector_input_dim=20, projector_output_dim=20)
    tower["intermediate_size"] = 64
    return transformers.Llama4Config(text_config=text, vision_config=tower, image_token_index=120)


def _gemma4() -> Any:
    text = _text(
        intermediate_size=DENSE,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        top_k_experts=TOP_K,
        enable_moe_block=True,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCAB,
        global_head_dim=8,
        num_kv_shared_layers=0,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    )
    del text["num_experts_per_tok"]
    tower = _tower(num_key_value_heads=2, head_dim=8, position_embedding_size=64, pooling_kernel_size=2)
    return transformers.Gemma4Config(
        text_config=text, vision_config=tower, audio_config=None, image_token_id=120, video_token_id=121
    )


def _mistral4() -> Any:
    return transformers.Mistral4Config(**_latent_text("mistral4"))


def _mistral3() -> Any:
    text = _latent_text("mistral4")
    tower = {**_tower(), "model_type": "pixtral", "head_dim": 8}
    return transformers.Mistral3Config(
        text_config=text, vision_config=tower, image_token_index=120, tie_word_embeddings=False
    )


def _aria() -> Any:
    text = _text(intermediate_size=WIDTH, moe_num_experts=EXPERTS, moe_topk=TOP_K, moe_num_shared_experts=2)
    del text["num_experts_per_tok"]
    tower = {**_tower(), "model_type": "idefics3_vision"}
    return transformers.AriaConfig(
        text_config=text, vision_config=tower, projector_patch_to_query_dict={16: 4}, image_token_index=120
    )


def _kimi_k25() -> Any:
    tower = _tower(pos_emb_height=4, pos_emb_width=4, pos_emb_time=2)
    del tower["image_size"]
    return transformers.Kimi_K25Config(
        text_config=_latent_text("deepseek_v3"),
        vision_config=tower,
        projection_hidden_size=16,
        tie_word_embeddings=False,
        **_IDS,
    )


def _step3p7() -> Any:
    text = _text(
        intermediate_size=DENSE,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        share_expert_dim=SHARED,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
    )
    return transformers.Step3p7Config(text_config=text, vision_config=_tower(), image_token_id=120)


def _minimax_m3_vl() -> Any:
    text = _text(
        intermediate_size=WIDTH,
        dense_intermediate_size=DENSE,
        shared_intermediate_size=SHARED,
        num_local_experts=EXPERTS,
        rotary_dim=4,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=8,
        index_topk_blocks=16,
        mlp_layer_types=["dense", "sparse"],
    )
    tower = _tower(temporal_patch_size=1, spatial_merge_size=2)
    return transformers.MiniMaxM3VLConfig(
        text_config=text, vision_config=tower, image_token_index=120, video_token_index=121, projector_hidden_size=20
    )


# Family -> (class that published folders name, its config).
WRAPPERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", _glm4v_moe),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", _qwen3_5_moe),
    "llama4": ("Llama4ForConditionalGeneration", _llama4),
    "gemma4": ("Gemma4ForConditionalGeneration", _gemma4),
    "mistral4": ("Mistral4ForCausalLM", _mistral4),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3),
    "aria": ("AriaForConditionalGeneration", _aria),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", _kimi_k25),
    "step3p7": ("Step3p7ForConditionalGeneration", _step3p7),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", _minimax_m3_vl),
}

# Those with a tower; Mistral 4 is a language model that transformers lists among models of images and text only.
TOWERS = frozenset(WRAPPERS) - {"mistral4"}
# Those whose first decoder layer is dense.
DENSE_FIRST = frozenset({"mistral4", "mistral3", "kimi_k25", "step3p7", "minimax_m3_vl"})


def build_wrapper(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of the class that published folders of a family name, in fp32 and eval mode."""
    name, make = WRAPPERS[family]
    config = make()
    config.dtype = torch.float32
    model: PreTrainedModel = getattr(transformers, name)._from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def save_wrapper(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Such a model saved by stock transformers, with a file of its image processor."""
    build_wrapper(family, seed=seed).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(folder / "config.json", lambda config: config.update(kept_by_no_class="yes"))
    return folder
