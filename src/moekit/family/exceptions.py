"""Fields that no rule over names can know: those that the family's own checkpoints set and its class leaves empty.

By the model type of the config that has them, or, for a nested config without a type, by the field that holds it.
"""

from __future__ import annotations

from typing import Any

from moekit.family.rules import VOCABULARY

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

_SWA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 10, "head_dim": 12}
_SWA |= {"qk_nope_head_dim": 8, "v_head_dim": 6}

_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [36, 48]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots3_note_text": {f"swa_{name}": value for name, value in _SWA.items()},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 28],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
    },
    "gemma4_text": {"global_head_dim": 24},
    "diffusion_gemma_text": {"global_head_dim": 24},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [1, 1, 2],
        }
    },
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "talker_config": {"spatial_merge_size": 2},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 20},
    "qwen4_exp_text": _INDEXER,
    "step3p5": {"sliding_window": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def exceptions_of(model_type: str, field: str) -> dict[str, Any]:
    """What the rules cannot know of a config.

    Args:
        model_type: of the config; "" for one without.
        field: that holds it; "" for the outermost.
    """
    return dict(_EXCEPTIONS.get(model_type or field, {}))
