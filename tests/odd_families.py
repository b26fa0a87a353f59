"""Tiny random models of families that keep, choose or call their experts otherwise than most.

Sizes as in `tests.families`, as far as the family lets them be chosen.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.families import DENSE, EXPERTS, HIDDEN, TOP_K, VOCAB, WIDTH, randomize

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_SPLIT: dict[str, Any] = {"intermediate_size": DENSE, "moe_intermediate_size": WIDTH, "num_experts_per_tok": TOP_K}

_KNOBS: dict[str, dict[str, Any]] = {
    "afmoe": {**_SPLIT, "num_experts": EXPERTS, "num_dense_layers": 0, "num_shared_experts": 1},
    "hy_v3": {**_SPLIT, "num_local_experts": EXPERTS, "num_shared_experts": 1,
              "mlp_layer_types": ["sparse", "sparse"]},
    "lfm2_moe": {**_SPLIT, "num_experts": EXPERTS, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "minimax_m2": {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "llama4_text": {
        "intermediate_size": WIDTH, "intermediate_size_mlp": DENSE, "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "interleave_moe_layer_step": 1, "attention_chunk_size": 64,
    },
    "aria_text": {"intermediate_size": WIDTH, "moe_num_experts": EXPERTS, "moe_topk": TOP_K,
                  "moe_num_shared_experts": 2},
    "inkling2_text": {**_SPLIT, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS},
    "inkling_text": {**_SPLIT, "n_routed_experts": EXPERTS, "n_shared_experts": 2,
                     "mlp_layer_types": ["sparse", "sparse"]},
    "zaya": {**_SPLIT, "num_experts": EXPERTS, "router_hidden_size": 20, "num_experts_per_tok": 1},
    "jetmoe": {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K,
               "kv_channels": 8, "num_key_value_heads": 2},
    "doge": {"intermediate_size": WIDTH, "num_experts": 16, "num_experts_per_tok": TOP_K, "is_moe": True},
    "deepseek_v4": {**_SPLIT, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS},
    "longcat_flash": {**_MLA, "ffn_hidden_size": DENSE, "expert_ffn_hidden_size": WIDTH, "num_layers": 2,
                      "n_routed_experts": EXPERTS, "zero_expert_num": 3, "moe_topk": TOP_K,
                      "num_attention_heads": 4, "head_dim": 4},
}  # fmt: skip


def _dbrx() -> PreTrainedConfig:
    return transformers.DbrxConfig(
        d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=VOCAB, pad_token_id=0,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "hidden_size": HIDDEN},
    )  # fmt: skip


NAMES = (*_KNOBS, "dbrx")


def config_of(family: str, **overrides: Any) -> PreTrainedConfig:
    """A tiny config; knobs that the family does not have are left out."""
    if family == "dbrx":
        return _dbrx()
    kind = transformers.CONFIG_MAPPING[family]
    known = kind()
    wanted = {**_COMMON, **_KNOBS[family], **overrides}
    return kind(**{key: value for key, value in wanted.items() if hasattr(known, key)})


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random fp32 model on the CPU, in eval mode."""
    config = config_of(family, **overrides)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # the experts of every token id
            table.copy_(torch.rand(len(table), EXPERTS, generator=torch.Generator().manual_seed(seed)).topk(TOP_K)[1])
    return model.eval()
