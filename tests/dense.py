"""Tiny dense models of the families that can be converted."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # large weights: with the usual 0.02 every block is close to the identity and mistakes would hide
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def dense_model(family: str, **fields: object) -> PreTrainedModel:
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**SMALL, **fields})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model.eval()
