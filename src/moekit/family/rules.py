"""What becomes of a config's field in a tiny model, by its name.

Sizes differ pairwise wherever families let them, so that a transposed or misplaced matrix has the wrong shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekit.checkpoint.names import EXPERT_COUNT_KEYS, TOP_K_KEYS

VOCABULARY = 128
HIDDEN = 32
LAYERS = 4
HEADS = 4
EXPERTS, TOP_K, GROUPS = 8, 2, 2
# First id that tokens of a modality take: `moekit.family.texts` uses none from here on.
FIRST_SPARE_TOKEN = 104


@dataclass(frozen=True)
class Role:
    """What a config describes.

    Attributes:
        text: language, or a modality beside it.
        hidden: width of the model.
        above: width of the language model that it feeds.
    """

    text: bool
    hidden: int
    above: int = HIDDEN


TEXT = Role(text=True, hidden=HIDDEN)
OTHER = Role(text=False, hidden=48)

# Given the value that the config has by itself, its role, and all fields of the config: the value in a tiny one.
Rule = Callable[[Any, Role, Mapping[str, Any]], Any]


def _fixed(value: Any) -> Rule:
    """This value, where the field is used at all: None, 0 and False switch it off."""
    return lambda given, role, fields: value if given else given


def _always(value: Any) -> Rule:
    return lambda given, role, fields: value


def _most(value: int) -> Rule:
    return lambda given, role, fields: min(given, value) if isinstance(given, int | float) else given


def _by_role(text: int, other: int) -> Rule:
    return lambda given, role, fields: (text if role.text else other) if given else given


def _hidden(given: Any, role: Role, fields: Mapping[str, Any]) -> Any:
    return role.hidden if given else given


def _above(given: Any, role: Role, fields: Mapping[str, Any]) -> Any:
    return role.above if given else given


def _shared(given: Any, role: Role, fields: Mapping[str, Any]) -> Any:
    """One, also where checkpoints alone say how many."""
    return 1 if given is None else min(given, 1)


def _expert_width(given: Any, role: Role, fields: Mapping[str, Any]) -> Any:
    """A list has a width for each modality."""
    return [24, 28][: len(given)] if isinstance(given, list | tuple) else 24


def _key_heads(given: Any, role: Role, fields: Mapping[str, Any]) -> Any:
    """As many as heads where the family's own config has it so: some share none."""
    if not given:
        return given
    heads = next((fields[name] for name in ("num_attention_heads", "n_heads") if name in fields), None)
    return HEADS if given == heads else min(given, 2)


def _stages(given: Any, role: Role, fields: Mapping[str, Any]) -> Any:
    """Widths of the stages of a tower."""
    return [16 * (stage + 1) for stage in range(len(given))] if given else given


def _spread(given: Any, role: Role, fields: Mapping[str, Any]) -> Any:
    """Indices of layers to read from: the last one alone."""
    return [LAYERS // 2 - 1] if given else given


_NAMED: tuple[tuple[str, Rule], ...] = (
    # vocabulary and length
    (r"(unpadded_|padded_)?vocab_size(_per_layer_input)?", _fixed(VOCABULARY)),
    (r"max_position_embeddings|max_seq_len|max_sequence_length|n_positions", _always(128)),
    # depth
    (r"num_hidden_layers|num_layers|n_layers?|(num_)?(encoder|decoder)_layers|depth", _by_role(LAYERS, LAYERS // 2)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_sparse_(en|de)coder_layers", _most(1)),
    (r"moe_layer_end_index", _always(LAYERS - 1)),
    (r".*_(pattern|interval|period|sparse_step|every_n_layers)|interleave_.*_step|layer_group_size", _most(2)),
    (r".*_layer_offset", _most(1)),
    (r"num_(nextn_predict|mtp)_layers", _always(0)),
    (r"n_layers_per_attn_res_block", _most(2)),
    (r".*layerdrop", _always(0.0)),
    # experts
    ("|".join(EXPERT_COUNT_KEYS), _always(EXPERTS)),
    ("|".join(TOP_K_KEYS), _always(TOP_K)),
    (r"n_group|num_expert_group", lambda given, role, fields: GROUPS if given and given > 1 else given),
    (r"topk_group", lambda given, role, fields: 1 if given else given),
    (r"(n|num|moe_num)_shared_experts", _shared),
    (r"(is|use|enable)_moe(_block)?", _always(True)),
    (r"zero_expert_num", _most(3)),
    (r"expert_capacity", _always(64)),
    # widths
    (r"hidden_size|adapter_in_dim|adapter_input_size|d_model|n_embd|embed_dim|encoder_dim|decoder_dim", _hidden),
    (r"moe_intermediate_size|expert_ffn_hidden_size", _expert_width),
    (r"(shared_intermediate|(moe_)?shared_experts?_intermediate)_size|share_expert_dim", _fixed(20)),
    (r"(dense_|prefix_dense_)intermediate_size|intermediate_size_mlp", _fixed(44)),
    (r"(intermediate|ffn_hidden)_size|d_ff|mlp_dim|(encoder|decoder)_ffn_dim|ffn_dim", _by_role(40, 56)),
    (r"moe_latent_size|moe_hidden_size", _fixed(28)),
    (r"hidden_size_per_layer_input", _fixed(10)),
    # attention
    (r"(num|n|swa_num|num_sliding)_(attention_)?heads|(encoder|decoder)_attention_heads", _fixed(HEADS)),
    (r"(num|swa_num|num_global)_key_value_heads|kv_n_heads", _key_heads),
    (r"(swa_|global_)?head_dim|kv_channels|d_kv|mamba_d_head|mamba_head_dim", _by_role(16, 12)),
    (r"q_lora_rank", _fixed(22)),
    (r"kv_lora_rank", _fixed(12)),
    (r"o_lora_rank", _fixed(14)),
    (r"qk_head_dim", _fixed(18)),
    (r"qk_nope_head_dim", _fixed(10)),
    (r"qk_rope_head_dim", _fixed(8)),
    (r"v_head_dim", _fixed(6)),
    (r"rotary_dim", _fixed(8)),
    (
        r"sliding_window(_size)?|attention_chunk_size|keep_window_size|rel_extent|(mamba_)?chunk_size|block_size",
        _most(16),
    ),
    (r"index_n_heads|indexer_n_heads", _fixed(4)),
    (r"index_head_dim|indexer_head_dim", _fixed(16)),
    (r"index_topk|index_block_size", _most(8)),
    (r"index_kpool", _most(4)),
    # state spaces and linear attention
    (r"linear_num_(key_)?heads", _most(2)),
    (r"linear_num_value_heads", _most(4)),
    (r"linear_((key|value)_)?head_dim", _most(8)),
    (r"mamba_(n|num)_heads", _fixed(4)),
    (r"ssm_state_size|mamba_d_state", _most(6)),
    (r"(mamba_)?n_groups|o_groups", _most(2)),
    (r"mamba_dt_rank", _most(5)),
    # what stands beside the language model
    (r"image_size", _always(16)),
    (r"patch_size", _always(4)),
    (r"max_img_size", _most(32)),
    (r"hidden_sizes", _stages),
    (r"downsample_channels", _stages),
    (r"output_channels", _always(28)),
    (r"num_position_embeddings|position_embedding_size", _always(16)),
    (r"(pos_emb|posemb)_(height|width|grid_size)", _always(4)),
    (r".*(visual_indexes|block_indexes|attn_indexes)", _spread),
    (r"(out|text|thinker)_hidden_size|(adapter_out|projector_output|output|vision_output)_dim", _above),
    (r"projector_input_dim|vision_hidden_size|audio_hidden_size", _always(OTHER.hidden)),
    (r"(projector|projection)_(hidden|intermediate)_(size|dim)|downsample_hidden_size", _always(36)),
)
RULES = tuple((re.compile(f"(?:{pattern})"), rule) for pattern, rule in _NAMED)


def rule_for(name: str) -> Rule | None:
    """The first rule whose pattern is the whole name; None where the field may stay as it is."""
    return next((rule for pattern, rule in RULES if pattern.fullmatch(name)), None)


def rotary_sections(values: Mapping[str, Any], stated: Mapping[str, Any]) -> list[int]:
    """Sections of a rotary embedding over time, height and width, which add up to half of what is turned of a head.

    Args:
        values: fields of the tiny config.
        stated: the family's rotary settings.
    """
    width = values.get("qk_rope_head_dim") or values.get("head_dim") or HIDDEN // HEADS
    half = int(width * (stated.get("partial_rotary_factor") or 1)) // 2
    return [half // 3, half // 3, half - 2 * (half // 3)]


def is_layer_list(value: object, layers: object) -> bool:
    """Whether a value is a list with an entry for each layer."""
    return isinstance(value, list | tuple) and isinstance(layers, int) and layers > 0 and len(value) == layers


def chosen_layers(lists: Mapping[str, Any], layers: int, count: int = LAYERS) -> list[int]:
    """Layers to keep of lists with an entry for each: the first of every kind, then from the front, in their order."""
    kinds: dict[tuple[str, ...], int] = {}
    for index in range(layers):
        kinds.setdefault(tuple(repr(values[index]) for values in lists.values()), index)
    first = list(kinds.values())[:count]
    rest = [index for index in range(layers) if index not in first]
    return sorted([*first, *rest[: count - len(first)]])
