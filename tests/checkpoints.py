"""Write checkpoints for tests: saved tiny models, hand-made shards, and damage done to either."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import moekit
from moekit.catalogue import MethodRecord
from moekit.checkpoint.model import save
from moekit.checkpoint.record import Record
from tests.families import build


def saved(
    folder: Path, family: str = "qwen2_moe", *, seed: int = 0, max_shard_bytes: int = 10**9, **overrides: Any
) -> Path:
    """A tiny random model saved by moekit, with its record."""
    record = Record(command="a test", seed=seed)
    save(build(family, seed=seed, **overrides), folder, record=record, max_shard_bytes=max_shard_bytes)
    return folder


def plain(folder: Path, family: str = "qwen2_moe", *, seed: int = 0, fused: bool = False, **overrides: Any) -> Path:
    """A tiny random model saved by stock transformers, without a record."""
    build(family, seed=seed, **overrides).save_pretrained(folder, save_original_format=not fused)
    return folder


def reopen(folder: Path, record: MethodRecord) -> PreTrainedModel:
    """What a method wrote, in fp32: by stock transformers where it promises so, else by moekit."""
    if "stock" in record.traits:
        opened: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        opened = moekit.load(folder, dtype=torch.float32, device="cpu")
    return opened.eval()


def write_raw(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file of arbitrary bytes; `length` lies about the header's size."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def write_header(path: Path, entries: Mapping[str, Any], data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    return write_raw(path, json.dumps(entries).encode(), data)


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite one shard with changed tensors, as a faulty tool would."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
