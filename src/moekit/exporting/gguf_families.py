"""Families that llama.cpp computes as transformers does: names of their architectures, sizes, and what must hold.

llama.cpp knows one way for each architecture where transformers asks the config: whether chosen weights are normalised,
which layers are dense, how positions turn. A config that says otherwise is refused: the file would load and be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moekit.errors import UnsupportedModel
from moekit.exporting.gguf_grouped import (
    YARN,
    add_scores,
    add_yarn,
    check_latent,
    grouped_sizes,
    is_latent,
    latent_sizes,
)


@dataclass(frozen=True)
class Family:
    """How a family is called and computed in GGUF.

    Attributes:
        architecture: name of the enumeration's member.
        demands: key of the config -> the only value that llama.cpp computes with.
        interleaved: whether query and key rows lie in pairs as llama.cpp turns them, where transformers has halves.
        width: key of the config that holds an expert's width.
        grouped: whether key heads may be fewer than query heads.
        sizes: further numbers: method of the writer -> how the config says it.
        scores: how a router with groups and scales weighs, sigmoid or softmax; empty for other routers.
    """

    architecture: str
    demands: Mapping[str, Any]
    interleaved: bool = False
    width: str = "moe_intermediate_size"
    grouped: bool = True
    sizes: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    scores: Literal["", "sigmoid", "softmax"] = ""


FAMILIES: dict[str, Family] = {
    "mixtral": Family("LLAMA", {"sliding_window": None}, interleaved=True, width="intermediate_size"),
    "qwen2_moe": Family(
        "QWEN2MOE",
        {"norm_topk_prob": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        sizes={"add_expert_shared_feed_forward_length": lambda config: int(config.shared_expert_intermediate_size)},
    ),
    "qwen3_moe": Family(
        "QWEN3MOE",
        {"norm_topk_prob": True, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": Family("OLMOE", {"norm_topk_prob": False, "clip_qkv": None}, width="intermediate_size", grouped=False),
    # The best group by its best expert, which DeepSeek-V2 itself has, llama.cpp does not compute.
    "deepseek_v2": Family("DEEPSEEK2", {"topk_method": "greedy"}, scores="softmax"),
    "deepseek_v3": Family("DEEPSEEK2", {"rope_interleave": True}, scores="sigmoid"),
    "glm4_moe": Family("GLM4_MOE", {}, scores="sigmoid"),
    "ernie4_5_moe": Family(
        "ERNIE4_5_MOE",
        {"moe_layer_interval": 1, "use_bias": False},
        sizes={
            "add_interleave_moe_layer_step": lambda config: 1,
            "add_leading_dense_block_count": lambda config: int(config.moe_layer_start_index),
            "add_expert_shared_count": lambda config: int(config.moe_num_shared_experts),
            "add_expert_shared_feed_forward_length": lambda config: (
                int(config.moe_num_shared_experts) * int(config.moe_intermediate_size)
            ),
        },
    ),
}
_LINEAR = "linear"


def family_of(config: Any, file: Any = None) -> Family:
    """The family of a config.

    Raises:
        UnsupportedModel: llama.cpp has no such family here, or computes it in another way than this config says.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise UnsupportedModel(
            f"{config.model_type} is not written as GGUF: known are {', '.join(FAMILIES)}",
            file=file,
            hint="--to compressed-tensors and --to auto-round take every family whose experts have names of their own",
        )
    for key, value in {"hidden_act": "silu", **found.demands}.items():
        told = getattr(config, key, value)
        if told != value and not (not told and not value):
            raise UnsupportedModel(
                f"{key} is {told!r}, and llama.cpp computes {config.model_type} with {value!r}",
                file=file,
                hint="--to compressed-tensors or --to auto-round keep the config as it is",
            )
    if not found.grouped and config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedModel(
            f"{config.num_key_value_heads} key heads serve {config.num_attention_heads} query heads, and llama.cpp "
            f"reads {config.model_type} with as many of both",
            file=file,
            hint="--to compressed-tensors or --to auto-round keep the config as it is",
        )
    last = getattr(config, "moe_layer_end_index", None)
    if last not in (None, -1, config.num_hidden_layers - 1):
        raise UnsupportedModel(
            f"layers after {last} are dense, and llama.cpp computes {config.model_type} with sparse ones to the end",
            file=file,
            hint="--to compressed-tensors or --to auto-round keep the config as it is",
        )
    kind = rope_of(config)[0]
    if is_latent(config):
        check_latent(config, file)
    if kind not in ("default", _LINEAR, *((YARN,) if is_latent(config) else ())):
        raise UnsupportedModel(f"positions are scaled by {kind!r}, which is not written as GGUF", file=file)
    return found


def rope_of(config: Any) -> tuple[str, float, float]:
    """How positions turn: kind, base, and factor of a linear scaling."""
    told = dict(getattr(config, "rope_parameters", None) or {})
    base = told.get("rope_theta", getattr(config, "rope_theta", 10000.0))
    return str(told.get("rope_type", "default")), float(base), float(told.get("factor", 1.0))


def add_sizes(writer: Any, config: Any, family: Family) -> None:
    """Write the numbers of the config.

    Args:
        writer: of the `gguf` package.
        config: of the model.
        family: of it.
    """
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kind, base, factor = rope_of(config)
    partial = float((getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))
    width = int(getattr(config, family.width))
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    numbers = {
        "add_vocab_size": config.vocab_size,
        "add_block_count": config.num_hidden_layers,
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_rope_dimension_count": int(head_dim * partial),
        "add_expert_count": experts,
        "add_expert_used_count": config.num_experts_per_tok,
        "add_expert_feed_forward_length": width,
        **{name: size(config) for name, size in family.sizes.items()},
        **(grouped_sizes(config) if family.scores else {}),
        **(latent_sizes(config) if is_latent(config) else {}),
    }
    for name, number in numbers.items():
        getattr(writer, name)(int(number))
    if family.scores:
        add_scores(writer, config, sigmoid=family.scores == "sigmoid")
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_freq_base(base)
    if kind == _LINEAR:
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    if kind == YARN:
        add_yarn(writer, config)
