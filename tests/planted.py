"""Random models with planted super experts: experts that answer a text's first token with one huge value."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.anatomy import find_moe_layers
from tests.tiny import tokenizer

# (layer, expert) -> size of the value
PLANTED = {(1, 7): 1000.0, (2, 40): 600.0}


def text(seed: int, first: int = 1) -> torch.Tensor:
    ids = torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = first
    return ids


def random_model(seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=64,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    for layer in find_moe_layers(model):  # transformers leaves some of these as they come
        for tensor in (layer.require_router().weight, *layer.experts.parameters()):
            nn.init.normal_(tensor, std=0.02)
    return model


@torch.no_grad()
def plant(model: PreTrainedModel) -> None:
    """Let one expert answer the first token with one huge value, in one layer after the other."""
    for (index, expert), size in PLANTED.items():
        layer = {layer.index: layer for layer in find_moe_layers(model)}[index]
        inputs: list[torch.Tensor] = []
        hook = layer.experts.register_forward_pre_hook(lambda m, args, kept=inputs: kept.append(args[0]))
        model(input_ids=text(0)[:1], use_cache=False)
        hook.remove()
        h_H = inputs[0].reshape(-1, 64)[0]
        layer.require_router().weight[expert] += 3 * h_H / h_H.norm()
        gate_I, up_I = (layer.experts.gate_up_proj[expert] @ h_H).chunk(2)
        a_I = nn.functional.silu(gate_I) * up_I
        layer.experts.down_proj[expert, 5 + index] += size * a_I / a_I.norm() ** 2


@torch.no_grad()
def write_planted(folder: Path, *, breaks: bool = False, seed: int = 0, planted: bool = True) -> Path:
    """Write such a model with a tokenizer.

    Args:
        folder: where to.
        breaks: let it depend on its super experts. Their two huge values silence all others in the last norm, so that
            every token is equally likely; the head makes much of what is left without them.
        seed: of the weights.
        planted: False for the same without super experts.
    """
    model = random_model(seed)
    if planted:
        plant(model)
    if breaks:
        model.lm_head.weight.mul_(12)
        model.lm_head.weight[:, [5 + layer for layer, _ in PLANTED]] = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
