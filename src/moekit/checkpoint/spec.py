"""A model's sizes as its config says them, by whichever names its family uses: one table of keys for all families.

Legend: E experts, K choices a token, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.checkpoint.names import EXPERT_COUNT_KEYS, TOP_K_KEYS, config_groups, text_config

# What is asked for -> the names that families give it; the first that holds a whole number counts.
KEYS: dict[str, tuple[str, ...]] = {
    "experts": EXPERT_COUNT_KEYS,
    "top_k": TOP_K_KEYS,
    "width": ("moe_intermediate_size", "intermediate_size"),
    "shared": ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"),
    "shared_width": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "first_dense": ("first_k_dense_replace", "moe_layer_start_index"),
    "every": ("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval"),
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
}


def stated(config: Mapping[str, Any], what: str) -> tuple[str, int] | None:
    """The key and the number by which a config says something of `KEYS`; None where it does not.

    Args:
        config: parsed config.json.
        what: a key of `KEYS`.
    """
    values = text_config(config)
    return next(((key, values[key]) for key in KEYS[what] if type(values.get(key)) is int), None)


@dataclass(frozen=True)
class MoESpec:
    """Sizes of a sparse model; 0 where the config does not say.

    Attributes:
        experts: E; 0 for dense models.
        top_k: K.
        width: I, neurons of a routed expert.
        shared: shared experts a layer, as the config counts them.
        shared_width: neurons of all shared experts of a layer together.
        first_dense: decoder layers before the first MoE layer.
        every: each so many decoder layers one is a MoE.
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: attention heads.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
        latent: numbers a token that multi-head latent attention caches in place of keys and values; 0 without.
        groups: groups of experts that a router chooses among first.
        top_groups: how many of them it takes.
        vocabulary: tokens.
        tied: whether embedding and head are one matrix.
    """

    experts: int
    top_k: int
    width: int
    shared: int
    shared_width: int
    first_dense: int
    every: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    latent: int
    groups: int
    top_groups: int
    vocabulary: int
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MoESpec:
        """Read a parsed config.json."""
        values = text_config(config)
        found = {what: number[1] if (number := stated(config, what)) else 0 for what in KEYS}
        heads, groups = found["heads"], config_groups(config)
        latent = values.get("kv_lora_rank") or 0
        return cls(
            **found
            | {
                "shared_width": found["shared_width"] or found["shared"] * found["width"],
                "every": found["every"] or 1,
                "kv_heads": found["kv_heads"] or heads,
                "head_dim": found["head_dim"] or (found["hidden"] // heads if heads else 0),
            },
            latent=latent and latent + (values.get("qk_rope_head_dim") or 0),
            groups=groups[0],
            top_groups=groups[1],
            tied=bool(values.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        )

    @property
    def cached_numbers(self) -> int:
        """Numbers that attention keeps of one token, all layers together."""
        return self.layers * (self.latent or 2 * self.kv_heads * self.head_dim)
