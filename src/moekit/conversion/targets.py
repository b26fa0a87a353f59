"""Configs of the stock MoE layouts that hold a converted model: Qwen2-MoE and Mixtral.

What easily goes wrong, and is set here: rotary parameters, tied embeddings and norm epsilon must be copied (the
layouts' defaults differ); Qwen2-MoE has biases in q, k, v by default; sliding windows are switched differently in each.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moekit.errors import BadConfig, UnsupportedModel

Target = Literal["qwen2_moe", "mixtral"]

_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class MoEGeometry:
    """Sizes of the MoE blocks to make.

    Attributes:
        experts: E.
        top_k: k.
        width: I, of each routed expert.
        shared_width: S; 0 for none.
        normalised: whether the chosen weights are divided by their sum (Mixtral always does).
        dense_layers: decoder layers that stay dense.
    """

    experts: int
    top_k: int
    width: int
    shared_width: int
    normalised: bool
    dense_layers: tuple[int, ...]


def target_config(dense: PreTrainedConfig, target: Target, geometry: MoEGeometry) -> PreTrainedConfig:
    """Config of the converted model.

    Raises:
        BadConfig: Mixtral with a shared expert, dense layers, or unnormalised weights, none of which it has.
        UnsupportedModel: the dense model has something that the target lacks.
    """
    heads = dense.num_attention_heads
    common: dict[str, Any] = {name: getattr(dense, name) for name in _COPIED}
    common["head_dim"] = getattr(dense, "head_dim", None) or dense.hidden_size // heads
    common["dtype"] = dense.dtype
    if target == "mixtral":
        return _mixtral(dense, geometry, common)
    return _qwen2_moe(dense, geometry, common)


def _sliding_layers(dense: PreTrainedConfig) -> list[bool]:
    """Which layers of the dense model look through a sliding window."""
    count = dense.num_hidden_layers
    if not getattr(dense, "sliding_window", None) or not getattr(dense, "use_sliding_window", True):
        return [False] * count
    kinds = getattr(dense, "layer_types", None)
    return [kind == "sliding_attention" for kind in kinds] if kinds else [True] * count


def _qwen2_moe(dense: PreTrainedConfig, geometry: MoEGeometry, common: dict[str, Any]) -> PreTrainedConfig:
    sliding = _sliding_layers(dense)
    return Qwen2MoeConfig(
        **common,
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=geometry.width,
        shared_expert_intermediate_size=geometry.shared_width,
        num_experts=geometry.experts,
        num_experts_per_tok=geometry.top_k,
        norm_topk_prob=geometry.normalised,
        decoder_sparse_step=1,
        mlp_only_layers=list(geometry.dense_layers),
        qkv_bias=dense.model_type == "qwen2",
        use_sliding_window=any(sliding),
        sliding_window=dense.sliding_window if any(sliding) else None,
        layer_types=["sliding_attention" if s else "full_attention" for s in sliding],
    )


def _mixtral(dense: PreTrainedConfig, geometry: MoEGeometry, common: dict[str, Any]) -> PreTrainedConfig:
    hint = "take the target qwen2_moe"
    if geometry.shared_width:
        raise BadConfig("Mixtral has no shared expert", hint=hint)
    if geometry.dense_layers:
        raise BadConfig(f"in Mixtral no layer stays dense, not {list(geometry.dense_layers)}", hint=hint)
    if not geometry.normalised:
        raise BadConfig("Mixtral always normalises the weights of the chosen experts", hint=hint)
    if dense.model_type == "qwen2":
        raise UnsupportedModel("Mixtral has no biases in q, k and v, which Qwen2 has", hint=hint)
    sliding = _sliding_layers(dense)
    if len(set(sliding)) > 1:
        raise UnsupportedModel("in Mixtral all layers have a sliding window or none", hint=hint)
    return MixtralConfig(
        **common,
        intermediate_size=geometry.width,
        num_local_experts=geometry.experts,
        num_experts_per_tok=geometry.top_k,
        sliding_window=dense.sliding_window if sliding[0] else None,
    )


def build(config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model that owns the given tensors; none is initialised first.

    Args:
        config: of `target_config`.
        state: every tensor of the model by its name in memory.

    Raises:
        UnsupportedModel: names or shapes do not fit, as for a dense model with extra norms.
    """
    cls = MixtralForCausalLM if config.model_type == "mixtral" else Qwen2MoeForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        # a shared expert of width 0
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model: PreTrainedModel = cls(config)
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None and not torch.equal(head, embedding):
        config.tie_word_embeddings = False  # the dense model was stored with a head of its own
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise UnsupportedModel(f"the weights do not fit {config.model_type}: {error}") from error
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or unexpected:
        raise UnsupportedModel(
            f"the dense model is no plain Llama: lacking {missing[:3]}, left over {unexpected[:3]}",
            hint="its layers have parts that the MoE layout has no place for",
        )
    model.tie_weights()
    # Rotary frequencies are no part of the state, so they are still on the meta device: make that module again.
    device = next(iter(state.values())).device
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    return model
