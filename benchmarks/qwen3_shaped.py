"""Checkpoints of random weights in the shape of Qwen3-30B-A3B, for benchmarks of speed and memory.

Each decoder layer is a file of its own, so that a checkpoint of fewer layers is made of hard links to the files of a
larger one, without another byte on disk.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from moekit.data import Document, train_tokenizer

REST = "model-rest.safetensors"
# Numbers drawn; each tensor is a window of them that begins elsewhere: drawing 15 billion would take longest of all.
DRAWN = 64 << 20


def shape_of(layers: int, *, experts: int = 128, top_k: int = 8, small: bool = False) -> Qwen3MoeConfig:
    """A config: the real sizes, or all of them an eighth, for a trial."""
    part = 8 if small else 1
    return Qwen3MoeConfig(
        vocab_size=151_936 // part,
        hidden_size=2048 // part,
        intermediate_size=6144 // part,
        moe_intermediate_size=768 // (6 if small else 1),
        num_hidden_layers=layers,
        num_attention_heads=32 // part,
        num_key_value_heads=max(4 // part, 1),
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def layer_tensors(config: Qwen3MoeConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one decoder layer as they are on disk."""
    hidden, width, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    wide, narrow = config.num_attention_heads * head, config.num_key_value_heads * head
    stem = f"model.layers.{layer}"
    for name, shape in {"q": (wide, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, wide)}.items():
        yield f"{stem}.self_attn.{name}_proj.weight", shape
    for name in ("q_norm", "k_norm"):
        yield f"{stem}.self_attn.{name}.weight", (head,)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{stem}.{norm}.weight", (hidden,)
    yield f"{stem}.mlp.gate.weight", (config.num_experts, hidden)
    for expert in range(config.num_experts):
        for name, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
            yield f"{stem}.mlp.experts.{expert}.{name}_proj.weight", shape


def rest_tensors(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what stands in no layer."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    yield "model.norm.weight", (config.hidden_size,)
    yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def bytes_of(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of bf16 tensors."""
    return sum(2 * torch.Size(shape).numel() for _, shape in tensors)


class Windows:
    """Tensors cut out of one drawn stretch of numbers, each from another place."""

    def __init__(self, scale: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._drawn = torch.empty(DRAWN, dtype=torch.bfloat16)
        for piece in self._drawn.split(1 << 20):
            piece.copy_(torch.randn(len(piece), generator=generator) * scale)
        self._number = 0

    def next(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor; ones where it is a norm's."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        flat, start, done = tensor.view(-1), self._number * 7_368_787 % DRAWN, 0
        self._number += 1
        while done < flat.numel():
            piece = self._drawn[start : start + flat.numel() - done]
            flat[done : done + piece.numel()] = piece
            start, done = 0, done + piece.numel()
        return tensor


def layer_file(layer: int) -> str:
    """Name of a layer's file."""
    return f"model-layer-{layer:05d}.safetensors"


def make(folder: Path, config: Qwen3MoeConfig) -> None:
    """Write a checkpoint, one layer in memory at a time."""
    folder.mkdir(parents=True)
    windows = Windows(config.hidden_size**-0.5)
    parts = {layer_file(layer): list(layer_tensors(config, layer)) for layer in range(config.num_hidden_layers)}
    parts[REST] = list(rest_tensors(config))
    for file, tensors in parts.items():
        save_file({name: windows.next(shape) for name, shape in tensors}, folder / file, metadata={"format": "pt"})
    _describe(folder, config)
    words().save_pretrained(folder)


def shortened(source: Path, folder: Path, layers: int) -> None:
    """The first layers of a checkpoint as one of its own, by hard links."""
    config = Qwen3MoeConfig.from_pretrained(source)
    config.num_hidden_layers = layers
    for name in ("max_window_layers", "layer_types"):
        setattr(config, name, None) if name == "layer_types" else setattr(config, name, layers)
    folder.mkdir(parents=True)
    for file in [REST, *(layer_file(layer) for layer in range(layers))]:
        os.link(source / file, folder / file)
    _describe(folder, config)
    words().save_pretrained(folder)


def _describe(folder: Path, config: Qwen3MoeConfig) -> None:
    """Config and index."""
    config.save_pretrained(folder)
    layers = range(config.num_hidden_layers)
    files = {name: layer_file(layer) for layer in layers for name, _ in layer_tensors(config, layer)}
    files |= {name: REST for name, _ in rest_tensors(config)}
    total = sum(bytes_of(layer_tensors(config, layer)) for layer in layers) + bytes_of(rest_tensors(config))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of some hundred invented words each."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(2, 9))) for _ in range(600)]
    return [" ".join(draw.choices(lexicon, k=400)) for _ in range(count)]


def words():  # type: ignore[no-untyped-def]
    """A tokenizer of bytes and a few words."""
    return train_tokenizer([Document(text, "words", "words") for text in sentences(4)], 400)


def write_text(file: Path, tokens: int) -> None:
    """A text of at least so many tokens."""
    lines = [json.dumps({"text": text}) for text in sentences(tokens // 600 + 2, seed=1)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
