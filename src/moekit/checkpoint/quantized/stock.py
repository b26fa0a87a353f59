"""Where stock transformers cannot load quantized weights on this device, or would misread them in silence.

It runs fp8 on GPUs that multiply it; elsewhere it turns weights into floats as it loads them, and takes the size of a
block from the number of scales: 576 rows with five scales are no blocks of 128 then, and 24 rows with two scales of
blocks of 16 become two blocks of 12.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from moekit._memory import is_out_of_memory
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import where
from moekit.checkpoint.quantized.base import WEIGHT, ceil_div
from moekit.checkpoint.quantized.fp8 import Fp8
from moekit.checkpoint.quantized.registry import formats_of, kind, quantization
from moekit.checkpoint.quantized.weights import quantized_weights
from moekit.errors import MoekitError, UnsupportedModel

# What runs layers of a quantized folder by itself.
_WAY_OUT = (
    "what runs layer by layer reads such weights by itself (moekit profile on a CPU, prune with its proof, "
    "super-experts, expert-sets); the whole model runs where transformers has kernels for it"
)
# Compute capability from which a GPU multiplies e4m3.
_FP8_CAPABILITY = (8, 9)


def _runs_fp8() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= _FP8_CAPABILITY
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def refuse_misread(checkpoint: Checkpoint) -> None:
    """Refuse fp8 weights whose last block is cut off, on devices where transformers would scale others with it.

    Raises:
        UnsupportedModel: names the tensor.
    """
    settings = quantization(checkpoint.config)
    if settings is None or _runs_fp8() or not any(isinstance(entry, Fp8) for entry in formats_of(settings)):
        return
    found = quantized_weights(checkpoint)
    assert found is not None
    for packed in found.weights.values():
        (rows, columns), (n, k), (b, c) = packed.shape[-2:], packed.facts["grid"], packed.facts["block"]
        if n != ceil_div(rows, b):  # two stacked halves, whose blocks are counted apart
            rows, n = rows // 2, n // 2
        if all(scales == 1 or size == scales * each for size, scales, each in ((rows, n, b), (columns, k, c))):
            continue
        layer, expert = where(packed.name)
        raise UnsupportedModel(
            f"without a GPU that runs fp8 transformers misreads {packed.name} of shape {list(packed.shape)}: its last "
            f"block of {b} x {c} is cut off, and all are taken to be of one size",
            file=checkpoint.path / packed.parts[WEIGHT].shard,
            layer=layer,
            expert=expert,
            hint=_WAY_OUT,
        )


@contextlib.contextmanager
def naming_quantizer(checkpoint: Checkpoint) -> Iterator[None]:
    """Say what works where transformers' own quantizer does not, such as for want of a package or a GPU.

    Raises:
        UnsupportedModel: transformers failed, and the weights are quantized.
    """
    settings = quantization(checkpoint.config)
    try:
        yield
    except MoekitError:
        raise
    except Exception as error:
        if settings is None or is_out_of_memory(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModel(
            f"transformers cannot load weights that are quantized so ({kind(settings)}) here: {reason}",
            file=checkpoint.path,
            hint=_WAY_OUT,
        ) from error
