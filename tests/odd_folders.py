"""Legal folders that hold more than a plain causal language model: more layers, a tower, a head of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3NextConfig,
)
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig

from tests.checkpoints import edit_json, plain
from tests.families import EXPERTS, HIDDEN, SHARED, TOP_K, VOCAB, WIDTH, build, randomize


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's model shards."""
    files = sorted(path for path in folder.glob("model*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def spread(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **metadata: Any) -> None:
    """Write tensors as one file, or as shards with an index."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    total = sum(tensor.nbytes for tensor in tensors.values())
    edit_json(index, lambda value: value.update(metadata={"total_size": total, **metadata}, weight_map=weight_map))


def with_mtp(folder: Path, *, fused: bool = False, shards: int = 1) -> tuple[Path, set[str]]:
    """A GLM-4 MoE of two layers, the third announced as one for multi-token prediction; that layer's names.

    Its projections are bfloat16 where all else is float32, so that a copy by way of the model would show.
    """
    model = build("glm4_moe", num_hidden_layers=2)
    model.save_pretrained(folder, save_original_format=not fused)
    tensors = tensors_of(folder)
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name] * 1.5
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16)
    tensors["model.layers.2.enorm.weight"] = torch.ones(HIDDEN)
    spread(folder, tensors, shards, total_parameters=5)
    edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=1, kept_by_no_class="yes"))
    return folder, {name for name in tensors if ".layers.2." in name}


def with_mtp_stack(folder: Path) -> Path:
    """A Qwen3-Next whose layer for multi-token prediction stands beside the decoder; its config announces nothing."""
    config = Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=8,
        num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, max_position_embeddings=128, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layer = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.")}
    tensors |= {n.replace("model.layers.1.", "mtp.layers.0."): t + 0.05 for n, t in layer.items()}
    generator = torch.Generator().manual_seed(3)
    tensors["mtp.fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, generator=generator) * 0.2
    tensors["mtp.pre_fc_norm_embedding.weight"] = torch.randn(HIDDEN, generator=generator) * 0.1
    tensors["mtp.pre_fc_norm_hidden.weight"] = torch.randn(HIDDEN, generator=generator) * 0.1
    tensors["mtp.norm.weight"] = torch.ones(HIDDEN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_vision(folder: Path) -> Path:
    """A vision MoE of the Qwen3.5 family, whose language model transformers loads alone."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": SHARED,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 128,
        "layer_types": ["full_attention"] * 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "num_position_embeddings": 16,
    }
    tokens = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    config.dtype = torch.float32
    model = Qwen3_5MoeForConditionalGeneration(config).float()
    randomize(model, 0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}')
    return folder


def with_own_head(folder: Path) -> Path:
    """A folder whose config ties the head to the embedding, but which stores a head of its own."""
    plain(folder, "qwen3_moe")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    return folder


def nudge(model: PreTrainedModel, where: Callable[[str], bool] = lambda name: "experts" in name) -> None:
    """Change some weights, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if where(name):
                parameter.mul_(1.25)
