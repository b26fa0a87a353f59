from pathlib import Path

import pytest
import torch

from moekit import _device
from moekit._device import compute_dtype, features_of, multiplies, named_dtype, resolve_device
from moekit.errors import BadConfig

CPU = torch.device("cpu")
X86 = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse avx2 fma bmi2\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16 i8mm\nCPU part\t: 0xd40\n"


def cpu_with(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(_device, "cpu_features", lambda: frozenset(features))


def test_the_kernel_tells_what_a_processor_can_do() -> None:
    assert features_of(X86) == {"fpu", "sse", "avx2", "fma", "bmi2"}
    assert features_of(ARM) == {"fp", "asimd", "asimdhp", "bf16", "i8mm"}


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no /proc/cpuinfo")
def test_torch_and_the_kernel_agree_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = features_of(Path("/proc/cpuinfo").read_text())
    monkeypatch.setattr(_device, "_CPU_INFO", Path("/nowhere"))
    told = _device.cpu_features.__wrapped__()
    assert ("avx512_bf16" in told) == ("avx512_bf16" in kernel)
    assert ("avx2" in told) == ("avx2" in kernel)


@pytest.mark.parametrize(
    ("features", "bf16", "fp16"),
    [
        ((), False, False),
        (("avx2", "fma"), False, False),
        (("avx512_f", "avx512_vnni"), False, False),
        (("avx512_bf16",), True, False),
        (("amx_tile", "amx_bf16"), True, False),
        (("avx512_bf16", "avx512_fp16"), True, True),
        (("asimd", "bf16", "asimdhp"), True, True),
    ],
)
def test_a_cpu_multiplies_what_it_has_instructions_for(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], bf16: bool, fp16: bool
) -> None:
    cpu_with(monkeypatch, *features)
    assert multiplies(torch.bfloat16, CPU) is bf16
    assert multiplies(torch.float16, CPU) is fp16
    assert compute_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if bf16 else torch.float32)
    assert compute_dtype(torch.float16, CPU) == (torch.float16 if fp16 else torch.float32)
    assert compute_dtype(torch.float32, CPU) == torch.float32
    assert compute_dtype(torch.float64, CPU) == torch.float64


def test_a_library_that_is_held_to_old_instructions_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch, "amx_bf16", "avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert not multiplies(torch.bfloat16, CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert multiplies(torch.bfloat16, CPU)


@pytest.mark.parametrize(("capability", "there"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_multiplies_bf16_from_compute_capability_8_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert multiplies(torch.bfloat16, torch.device("cuda")) is there
    assert multiplies(torch.float16, torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert multiplies(torch.bfloat16, torch.device("cuda"))


def test_auto_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda:3")
    assert resolve_device(CPU) == CPU


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:7"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(BadConfig, match=f"'{device}' cannot be used"):
        resolve_device(device)


@pytest.mark.parametrize("dtype", ["int4", "bf16", "int8", torch.int64, "float8_e4m3fn"])
def test_a_type_that_models_do_not_compute_in_is_refused(dtype: str | torch.dtype) -> None:
    with pytest.raises(BadConfig) as caught:
        named_dtype(dtype)
    assert "auto, float32, bfloat16, float16" in str(caught.value.hint)


def test_types_have_names() -> None:
    assert named_dtype("auto") is None
    assert named_dtype("bfloat16") == named_dtype(torch.bfloat16) == named_dtype("torch.bfloat16") == torch.bfloat16
