"""In which type the weights of a checkpoint lie on disk, and in which one to load them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moekit._device import compute_dtype, named_dtype
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.names import text_config
from moekit.checkpoint.stored import Stored

if TYPE_CHECKING:
    import torch

    from moekit.checkpoint.folder import Checkpoint
    from moekit.checkpoint.safety import TensorInfo

# What safetensors calls a type -> what torch calls it.
_NAMES = {short: long.removeprefix("torch.") for long, short in TORCH_NAMES.items()}


def stored_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> torch.dtype | None:
    """The type in which a checkpoint is stored: what its config says, else that of its first tensor of floats.

    None where it is quantized, or stored in a type that is no float's.
    """
    return None if "quantization_config" in config else unquantized_dtype(config, tensors)


def unquantized_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> torch.dtype | None:
    """As `stored_dtype`; of a quantized checkpoint the type of what is not quantized."""
    import torch

    inner = text_config(config)
    told = [values.get(key) for values in (config, inner) for key in ("dtype", "torch_dtype")]
    named = next((str(name) for name in told if isinstance(name, str)), None)
    names = [_NAMES.get(info.dtype, "") for info in tensors.values()] if named is None else [named]
    kinds = (getattr(torch, name.removeprefix("torch."), None) for name in names)
    return next((kind for kind in kinds if isinstance(kind, torch.dtype) and kind.is_floating_point), None)


def loading_dtype(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device
) -> tuple[str | torch.dtype, Stored | None]:
    """In which type to load a checkpoint, and how it is stored if "auto" takes a wider one.

    Raises:
        BadConfig: no type that models compute in.
    """
    asked = named_dtype(dtype)
    stored = stored_dtype(checkpoint.config, checkpoint.tensors)
    wanted = reading_dtype(checkpoint, asked, device)
    if asked is not None or stored is None or wanted == stored:
        return asked or "auto", None
    return wanted or "auto", stored_form(checkpoint)


def stored_form(checkpoint: Checkpoint) -> Stored | None:
    """How the weights of a checkpoint lie on disk; None where it is quantized, or nothing tells."""
    stored = stored_dtype(checkpoint.config, checkpoint.tensors)
    if stored is None:
        return None
    return Stored(stored, frozenset(name for name, info in checkpoint.tensors.items() if info.dtype == "F32"))


def reading_dtype(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: str | torch.device = "auto"
) -> torch.dtype | None:
    """The type to compute in: the one given, else as stored, else float32 where the device would emulate that.

    None where only the config's class knows: nothing says how the checkpoint is stored.
    """
    stored = unquantized_dtype(checkpoint.config, checkpoint.tensors)
    return dtype or (None if stored is None else compute_dtype(stored, device))
