"""Where computing happens and in which precision, chosen in one place by what the device can do.

bfloat16 is fast where the device multiplies it itself. Elsewhere it is emulated, three to five times slower than
float32 from about a hundred tokens a pass on. So "auto" means a GPU if there is one, and float32 wherever a
checkpoint's half precision would have to be emulated.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from moekit.errors import BadConfig

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE_HELP = (
    "of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half precision"
)
DEVICE_HELP = "cpu, cuda, ..., or auto: a GPU if there is one"
DTYPES: tuple[str, ...] = get_args(DtypeName)

_CPU_INFO = Path("/proc/cpuinfo")
# Instructions that multiply numbers of a type, as Linux names them; cpuinfo and torch differ in underscores only.
_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16", "sve_bf16"})
_FP16 = frozenset({"avx512_fp16", "amx_fp16", "asimdhp", "fp16_arith"})
# oneDNN, which multiplies matrices for torch, can be held to older instructions: these hold it below bfloat16.
_OLD_ISA = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that is meant: "auto" is a GPU if there is one, under torchrun that of the local rank, else the CPU.

    Raises:
        BadConfig: it is not here, or torch does not know it.
    """
    import torch

    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda" if rank is None else f"cuda:{rank}")
    try:
        found = torch.device(device)
        if found.type != "cpu":
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadConfig(f"device {device!r} cannot be used: {reason}", hint="say cpu, cuda, ..., or auto") from error
    return found


def named_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The type of a name; None for "auto".

    Raises:
        BadConfig: none of those that models compute in; lists them.
    """
    import torch

    named = dtype.removeprefix("torch.") if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if named == "auto":
        return None
    if named not in (*DTYPES, "float64"):
        raise BadConfig(f"dtype {named!r} is none that models compute in", hint=f"choose {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, named)
    return found


def compute_dtype(stored: torch.dtype, device: str | torch.device = "auto") -> torch.dtype:
    """The type to compute in where a checkpoint stores `stored`: the same, or float32 where that would be emulated."""
    import torch

    half = stored in (torch.bfloat16, torch.float16)
    return torch.float32 if half and not multiplies(stored, resolve_device(device)) else stored


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16 or float16; no clock is asked."""
    import torch

    bf16 = dtype == torch.bfloat16
    if device.type == "cpu":
        return _cpu_multiplies(bf16)
    if device.type == "cuda":
        # AMD's matrix cores take both; NVIDIA's took bfloat16 with compute capability 8.0.
        return not bf16 or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "mps":
        return not bf16
    asked = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return not bf16 or bool(asked is not None and asked())


def _cpu_multiplies(bf16: bool) -> bool:
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if held in _OLD_ISA:
        return False
    return bool(cpu_features() & (_BF16 if bf16 else _FP16))


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU, from torch and from the kernel."""
    import torch

    asked: Any = getattr(torch.cpu, "get_capabilities", dict)
    try:
        told = asked()
    except (AttributeError, RuntimeError):
        told = {}
    found = {name for name, there in told.items() if there is True}
    found |= features_of(_CPU_INFO.read_text()) if _CPU_INFO.is_file() else set()
    # On a Mac torch multiplies through Accelerate, which has no bfloat16.
    return frozenset() if platform.system() == "Darwin" else frozenset(found)


def features_of(cpuinfo: str) -> set[str]:
    """What /proc/cpuinfo lists under "flags" (x86) or "Features" (ARM)."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return {word for key, _, words in lines if key.strip() in ("flags", "Features") for word in words.split()}
