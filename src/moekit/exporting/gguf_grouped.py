"""What DeepSeek's and GLM's models need beyond other families: scores of their routers, and latent attention.

Latent attention keeps a compressed key and value for each token. Its `kv_b_proj` spreads them over heads, rows of keys
and rows of values of a head one after the other; llama.cpp multiplies the query with the keys' part instead, and has
the two apart, the keys' part turned.

Legend: N heads, K rows of a head's keys, V of its values, L latent width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moekit.errors import UnsupportedModel

# Layers with which llama.cpp takes a model for one whose queries are not compressed (DeepSeek-V2-Lite and its like).
_LITE = (26, 27)
YARN = "yarn"


def is_latent(config: Any) -> bool:
    """Whether keys and values are compressed."""
    return getattr(config, "kv_lora_rank", None) is not None


def latent_parts(weight: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """The keys' part [N, L, K] and the values' part [N, V, L] of `kv_b_proj` [N (K + V), L]."""
    keys = int(config.qk_nope_head_dim)
    heads_NRL = weight.reshape(int(config.num_attention_heads), keys + int(config.v_head_dim), -1)
    return heads_NRL[:, :keys].transpose(1, 2).contiguous(), heads_NRL[:, keys:].contiguous()


def latent_shapes(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of both."""
    heads, latent = int(config.num_attention_heads), int(config.kv_lora_rank)
    return (heads, latent, int(config.qk_nope_head_dim)), (heads, int(config.v_head_dim), latent)


def check_latent(config: Any, file: Any = None) -> None:
    """Refuse a model that llama.cpp would read otherwise.

    Raises:
        UnsupportedModel: says what is in the way.
    """
    lite, compressed = config.num_hidden_layers in _LITE, config.q_lora_rank is not None
    if lite == compressed:
        queries = "compressed" if compressed else "not compressed"
        raise UnsupportedModel(
            f"llama.cpp tells by the number of layers whether queries are compressed: those of this model are "
            f"{queries}, and it has {config.num_hidden_layers} layers",
            file=file,
            hint="--to compressed-tensors and --to auto-round keep the config as it is",
        )
    told = dict(config.rope_parameters or {})
    even = told.get("mscale", 0) == told.get("mscale_all_dim", 0) and told.get("attention_factor") is None
    usual = told.get("beta_fast") in (None, 32) and told.get("beta_slow") in (None, 1)
    if told.get("rope_type") == YARN and not (even and told.get("mscale") and usual and told.get("truncate", True)):
        raise UnsupportedModel(
            "positions are scaled by yarn with factors of their own, and llama.cpp takes mscale equal to "
            "mscale_all_dim, beta_fast 32 and beta_slow 1",
            file=file,
            hint="--to compressed-tensors and --to auto-round keep the config as it is",
        )


def latent_sizes(config: Any) -> dict[str, int]:
    """Sizes of heads: to llama.cpp all of them share one key, the latent with its turned part."""
    turned, latent = int(config.qk_rope_head_dim), int(config.kv_lora_rank)
    ranks = {} if config.q_lora_rank is None else {"add_q_lora_rank": int(config.q_lora_rank)}
    return {
        **ranks,
        "add_head_count_kv": 1,
        "add_kv_lora_rank": latent,
        "add_key_length": latent + turned,
        "add_value_length": latent,
        "add_key_length_mla": int(config.qk_nope_head_dim) + turned,
        "add_value_length_mla": int(config.v_head_dim),
        "add_rope_dimension_count": turned,
    }


def grouped_sizes(config: Any) -> dict[str, int]:
    """Shared experts, dense layers before the first sparse one, and groups of experts that are chosen first."""
    return {
        "add_leading_dense_block_count": int(config.first_k_dense_replace),
        "add_expert_shared_count": int(config.n_shared_experts),
    }


def add_scores(writer: Any, config: Any, *, sigmoid: bool) -> None:
    """How weights follow from logits: sigmoid or softmax, normalised or not, scaled, chosen among groups or not."""
    import gguf

    kinds = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    writer.add_expert_weights_norm(bool(sigmoid and config.norm_topk_prob))
    writer.add_expert_weights_scale(float(config.routed_scaling_factor))
    if sigmoid and (config.n_group or 1) > 1:
        writer.add_expert_group_count(int(config.n_group))
        writer.add_expert_group_used_count(int(config.topk_group))


def add_yarn(writer: Any, config: Any) -> None:
    """Positions scaled by yarn, as DeepSeek's models have them."""
    import gguf

    told = dict(config.rope_parameters)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(told["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(told["original_max_position_embeddings"]))
    writer.add_rope_scaling_yarn_log_mul(0.1 * float(told["mscale_all_dim"]))  # llama.cpp divides by 0.1 again
