"""Refusing what cannot fit, before it is allocated; and saying so where it did not fit after all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from moekit.errors import OutOfBudget
from moekit.training.config import TrainConfig

# What a layer keeps for its backward pass of each token, at the very least: its input and its attention's output.
_KEPT_OF_A_LAYER = 2
_ORDER_BYTES = 8


def available_bytes(device: torch.device) -> int | None:
    """Memory that may be allocated on a device now; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = _linux()
    if known is not None:
        return known
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _linux() -> int | None:
    """What Linux says could be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def least_bytes(model: PreTrainedModel, config: TrainConfig, steps: int, world: int) -> int:
    """A lower bound of what a run allocates: inputs of one micro-batch, and what layers keep of it; rows in order."""
    text = model.config.get_text_config()
    tokens = config.batch * config.seq_len
    layers = int(getattr(text, "num_hidden_layers", 1))
    kept = 1 if config.activation_checkpointing else _KEPT_OF_A_LAYER * layers
    activations = tokens * int(getattr(text, "hidden_size", 1)) * kept * 2  # half precision, if it comes to that
    order = steps * config.batch * config.accumulation * world * _ORDER_BYTES
    return activations + tokens * 3 * 8 + order


def check_memory(model: PreTrainedModel, config: TrainConfig, steps: int, world: int) -> None:
    """Refuse a run whose lower bound exceeds the memory that there is.

    Raises:
        OutOfBudget: naming needed and available bytes.
    """
    needed, there = least_bytes(model, config, steps, world), available_bytes(model.device)
    if there is not None and needed > there:
        raise OutOfBudget(
            f"training needs at least {needed:,} bytes of memory on {model.device}, and {there:,} are available",
            hint="give a smaller batch, seq_len or accumulation, or fewer steps",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's or Python's way to say that there is no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def memory_named() -> Iterator[None]:
    """Turn a failed allocation into an error that says what to do.

    Raises:
        OutOfBudget: memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfBudget(
            f"memory did not suffice: {str(error).splitlines()[0] if str(error) else 'no message'}",
            hint="give a smaller batch or seq_len, or activation_checkpointing",
        ) from error
