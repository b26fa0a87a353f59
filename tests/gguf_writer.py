"""Write a Mixtral or Qwen3-MoE that transformers opened as a GGUF file in fp32, for llama.cpp to open.

Names of tensors and keys are those of the `gguf` package. The file carries no vocabulary: it is driven with token ids.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import MODEL_TENSOR
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moekit.anatomy import find_moe_layers

ARCHITECTURES = {"mixtral": gguf.MODEL_ARCH.LLAMA, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE}


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write the whole model."""
    architecture = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, model)

    def add(tensor: MODEL_TENSOR, value: Tensor, layer: int | None = None) -> None:
        name = gguf.TENSOR_NAMES[tensor] if layer is None else gguf.TENSOR_NAMES[tensor].format(bid=layer)
        writer.add_tensor(f"{name}.weight", _array(value))

    add(MODEL_TENSOR.TOKEN_EMBD, model.model.embed_tokens.weight)
    add(MODEL_TENSOR.OUTPUT_NORM, model.model.norm.weight)
    if not model.config.tie_word_embeddings:
        add(MODEL_TENSOR.OUTPUT, model.lm_head.weight)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        add(MODEL_TENSOR.ATTN_NORM, layer.input_layernorm.weight, number)
        query, key = attention.q_proj.weight, attention.k_proj.weight
        if architecture is gguf.MODEL_ARCH.LLAMA:
            query, key = (_interleaved(weight, attention.head_dim) for weight in (query, key))
        else:
            add(MODEL_TENSOR.ATTN_Q_NORM, attention.q_norm.weight, number)
            add(MODEL_TENSOR.ATTN_K_NORM, attention.k_norm.weight, number)
        add(MODEL_TENSOR.ATTN_Q, query, number)
        add(MODEL_TENSOR.ATTN_K, key, number)
        add(MODEL_TENSOR.ATTN_V, attention.v_proj.weight, number)
        add(MODEL_TENSOR.ATTN_OUT, attention.o_proj.weight, number)
        add(MODEL_TENSOR.FFN_NORM, layer.post_attention_layernorm.weight, number)
    for moe in find_moe_layers(model):
        gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)
        add(MODEL_TENSOR.FFN_GATE_INP, moe.require_router().weight, moe.index)
        add(MODEL_TENSOR.FFN_GATE_EXP, gate, moe.index)
        add(MODEL_TENSOR.FFN_UP_EXP, up, moe.index)
        add(MODEL_TENSOR.FFN_DOWN_EXP, moe.experts.down_proj, moe.index)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    config, geometry = model.config, find_moe_layers(model)[0].geometry
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(geometry.experts)
    writer.add_expert_used_count(geometry.top_k)
    writer.add_expert_feed_forward_length(geometry.width)


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a head from halves, as transformers turns them, to neighbours, as llama.cpp's Llama does."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _array(value: Tensor) -> NDArray[np.float32]:
    return value.detach().to(torch.float32).contiguous().numpy()
