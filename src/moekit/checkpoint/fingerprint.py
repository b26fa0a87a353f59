"""Name a model by a few thousand of its numbers: cheap enough to compute at every load, different for every model.

The fingerprint is SHA-256 over the sorted tensors, as they lie on disk in the stock layout: name, dtype, shape and the
bytes of 64 evenly spaced elements of each matrix; and over the config keys that decide what a forward computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.checkpoint.hollow import is_hollow
from moekit.checkpoint.names import config_top_k, is_part_tensor, text_config
from moekit.checkpoint.stored import as_stored

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moekit.checkpoint.provenance import Provenance

SAMPLES = 64
# Attribute of a live model that says where it came from.
STAMP = "moekit_provenance"

TORCH_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}

_SIZE_KEYS = ("hidden_size", "num_hidden_layers")


def sample_positions(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Flat indices of the sampled elements: of each matrix (last two sizes) 64 evenly spaced ones, or all if fewer."""
    numel = int(np.prod(shape, dtype=np.int64))
    if numel == 0:
        return np.zeros(0, dtype=np.int64)
    matrix = int(np.prod(shape[-2:], dtype=np.int64))
    count = min(SAMPLES, matrix)
    inside = np.arange(count, dtype=np.int64) * (matrix - 1) // max(count - 1, 1)
    starts = np.arange(numel // matrix, dtype=np.int64) * matrix
    return (starts[:, None] + inside[None, :]).reshape(-1)


def _geometry(config: Mapping[str, Any]) -> str:
    inner = text_config(config)
    parts = [f"model_type={config.get('model_type')}", f"top_k={config_top_k(config)}"]
    return ";".join(parts + [f"{key}={inner.get(key)}" for key in _SIZE_KEYS])


def combine(samples: Iterable[tuple[str, str, tuple[int, ...], bytes]], config: Mapping[str, Any]) -> str:
    """Fingerprint from (name, dtype, shape, sampled bytes) of every tensor and the config."""
    digest = hashlib.sha256(_geometry(config).encode())
    for name, dtype, shape, data in sorted(samples):
        digest.update(f"\n{name}|{dtype}|{','.join(map(str, shape))}|".encode())
        digest.update(data)
    return digest.hexdigest()


def _sampled(tensor: torch.Tensor) -> bytes:
    import torch

    positions = torch.from_numpy(sample_positions(tuple(tensor.shape))).to(tensor.device)
    if not positions.numel():
        return b""
    flat = tensor.detach().contiguous().reshape(-1)
    elements = flat.view(torch.uint8).view(flat.numel(), -1)[positions]
    return bytes(elements.cpu().numpy())


def fingerprint_tensors(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    """Fingerprint of tensors in memory, by the names given."""
    return combine(((n, TORCH_NAMES[str(t.dtype)], tuple(t.shape), _sampled(t)) for n, t in tensors.items()), config)


def provenance_of(model: object) -> Provenance | None:
    """Which checkpoint a model was loaded from, as `moekit.load` noted on it; None for any other model."""
    found: Provenance | None = getattr(model, STAMP, None)
    return found


def live_fingerprint(model: PreTrainedModel) -> str:
    """Fingerprint of a live model by its in-memory layout; changes with its weights, differs from that on disk."""
    state = {n: t for n, t in model.state_dict().items() if not is_part_tensor(n) and not is_hollow(t)}
    return fingerprint_tensors(state, model.config.to_dict())


def fingerprint_model(model: PreTrainedModel) -> str:
    """Fingerprint of a live model, equal to that of the checkpoint it was loaded from or would be saved as.

    A model from `moekit.load` whose weights have not changed since answers with the stamp of its checkpoint; any other
    is brought into the stock on-disk layout (views, hardly a copy) and sampled.
    """
    stamp = provenance_of(model)
    if stamp is not None and stamp.live == live_fingerprint(model):
        return str(stamp.fingerprint)
    with as_stored(model):
        return fingerprint_tensors(disk_state_dict(model), model.config.to_dict())


def untied_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The stock state dict with every tied weight once, under the name that is saved; runtime parts left out."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_part_tensor(name)}
    for copy, original in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if original in state:
            state.pop(copy, None)
    return state


def disk_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict in the stock on-disk layout, tied weights once, as `save_pretrained` would write it."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, untied_state_dict(model))
    return reverted
