"""Tiny random models of every family that moekit promises to work with, built from stock transformers configs.

Use `build("mixtral")`, or parametrize over `FAMILIES`. Sizes are chosen pairwise different (hidden 32, expert width
24, dense width 40, shared width 20 or 24, vocabulary 128, 8 experts, top-2), so that a transposed or misplaced
matrix cannot pass by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

HIDDEN, WIDTH, DENSE, SHARED, VOCAB, EXPERTS, TOP_K = 32, 24, 40, 20, 128, 8, 2


def _common(layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _mixtral() -> PreTrainedConfig:
    return transformers.MixtralConfig(
        **_common(), intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, sliding_window=None
    )


def _qwen2_moe() -> PreTrainedConfig:
    return transformers.Qwen2MoeConfig(
        **_common(),
        intermediate_size=DENSE,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )


def _qwen3_moe() -> PreTrainedConfig:
    return transformers.Qwen3MoeConfig(
        **_common(),
        head_dim=8,
        intermediate_size=DENSE,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )


def _olmoe() -> PreTrainedConfig:
    return transformers.OlmoeConfig(
        **_common(), intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )


def _latent_attention() -> dict[str, Any]:
    return {
        **_common(3),
        "num_key_value_heads": 4,
        "intermediate_size": DENSE,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }


def _deepseek_v2() -> PreTrainedConfig:
    return transformers.DeepseekV2Config(**_latent_attention(), topk_method="group_limited_greedy")


def _deepseek_v3() -> PreTrainedConfig:
    return transformers.DeepseekV3Config(**_latent_attention(), norm_topk_prob=True)


def _glm4_moe() -> PreTrainedConfig:
    return transformers.Glm4MoeConfig(
        **_common(3),
        head_dim=8,
        intermediate_size=DENSE,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
    )


def _gpt_oss() -> PreTrainedConfig:
    return transformers.GptOssConfig(
        **_common(),
        head_dim=8,
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _phimoe() -> PreTrainedConfig:
    return transformers.PhimoeConfig(
        **_common(), intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )


def _granitemoe() -> PreTrainedConfig:
    return transformers.GraniteMoeConfig(
        **_common(), intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )


def _ernie4_5_moe() -> PreTrainedConfig:
    return transformers.Ernie4_5_MoeConfig(
        **_common(3),
        intermediate_size=DENSE,
        moe_intermediate_size=WIDTH,
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "phimoe": _phimoe,
    "granitemoe": _granitemoe,
    "ernie4_5_moe": _ernie4_5_moe,
}


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight: matrices keep activations of order one, norms lie near one, biases are small but never zero.

    Fresh models have zero routers and zero selection biases, where every routing looks alike.
    """
    generator = torch.Generator().manual_seed(seed)
    persistent = set(model.state_dict())
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight") or ("layernorm" in name and name.endswith("weight")):
            tensor.copy_(1 + 0.1 * noise)
        elif tensor.dim() >= 2 and tensor.shape[-1] > 1 and not name.endswith("bias"):
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)
        else:
            tensor.copy_(0.1 * noise)


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random fp32 model on the CPU, in eval mode.

    Args:
        family: a key of `FAMILIES`.
        seed: of the weights; equal seeds give equal models.
        overrides: config attributes set before the model is built, by the names the family's config uses or maps.
    """
    config = FAMILIES[family]()
    if overrides:
        names = config.attribute_map
        known = {names.get(key, key): value for key, value in config.to_dict().items()}
        if "num_hidden_layers" in overrides:  # lists with an entry for each layer were derived from the old number
            known = {k: v for k, v in known.items() if not (isinstance(v, list) and len(v) == config.num_hidden_layers)}
        config = type(config)(**known | {names.get(key, key): value for key, value in overrides.items()})
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length] below the vocabulary size, none of them special."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 logits [B, S, vocabulary] of a forward without cache."""
    return model(input_ids=tokens() if input_ids is None else input_ids, use_cache=False).logits.float()
