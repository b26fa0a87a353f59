"""Every format read against its definition: worked examples by hand, and slow readers on random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moekit.checkpoint.folder import Checkpoint, read_tensors
from moekit.checkpoint.quantized.weights import WeightReader
from moekit.errors import BadCheckpoint, UnsupportedModel
from tests.quantizing import (
    AWQ_OUTPUTS,
    Tensors,
    awq_words,
    e2m1,
    e4m3,
    from_fp8,
    from_mxfp4,
    from_words,
    to_fp8,
    to_mxfp4,
    words_along,
)

STEM = "model.layers.1.mlp.experts.3.up_proj"
WEIGHT = f"{STEM}.weight"


def opened(folder: Path, tensors: Tensors, settings: Mapping[str, Any]) -> WeightReader:
    made = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return WeightReader(Checkpoint(folder, {"quantization_config": settings}, read_tensors(folder), None))


def read(folder: Path, tensors: Tensors, settings: Mapping[str, Any], name: str = WEIGHT) -> torch.Tensor:
    with opened(folder, tensors, settings) as reader:
        return reader.weight(name)


def drawn(*shape: int, seed: int = 0, below: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator) if below is None else torch.randint(below, shape, generator=generator)
    )


# fp8


def fp8(block: tuple[int, int] | None = (2, 2), **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": block and list(block), **more}


def test_fp8_by_hand(tmp_path: Path) -> None:
    stored = torch.tensor([[1.0, 2, 4], [3, -1, 2]]).to(torch.float8_e4m3fn)
    found = read(tmp_path, {WEIGHT: stored, f"{WEIGHT}_scale_inv": torch.tensor([[0.5, 10]])}, fp8())
    assert found.tolist() == [[0.5, 1, 40], [1.5, -0.5, 20]]


def test_every_eight_bit_float(tmp_path: Path) -> None:
    every = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8).view(2, 127)
    tensors = {WEIGHT: every.view(torch.float8_e4m3fn), f"{WEIGHT}_scale_inv": torch.ones(1, 1)}
    assert read(tmp_path, tensors, fp8((128, 128))).tolist() == [[e4m3(b) for b in row] for row in every.tolist()]


@pytest.mark.parametrize("shape", [(24, 32), (13, 21), (5, 3), (8, 8), (1, 17)])
@pytest.mark.parametrize("block", [(8, 8), (16, 4)])
def test_fp8_blocks(shape: tuple[int, int], block: tuple[int, int], tmp_path: Path) -> None:
    packed, scale = to_fp8(drawn(*shape), block)
    found = read(tmp_path, {WEIGHT: packed, f"{WEIGHT}_scale_inv": scale}, fp8(block))
    assert torch.equal(found, from_fp8(packed, scale, block))


@pytest.mark.parametrize(
    ("scale_shape", "suffix"),
    [((), "_scale"), ((1,), "_scale"), ((1, 1), "_scale_inv"), ((6, 1), "_scale"), ((6,), "_scale")],
)
@pytest.mark.parametrize("told", [True, False], ids=["null", "left out"])
def test_fp8_without_blocks(scale_shape: tuple[int, ...], suffix: str, told: bool, tmp_path: Path) -> None:
    packed, _ = to_fp8(drawn(6, 5), (6, 5))
    scale = drawn(*scale_shape).abs() + 0.5
    settings = fp8(None) if told else {"quant_method": "fp8"}
    expected = from_fp8(packed, scale.reshape(-1, 1), (6 // scale.numel(), 5))
    assert torch.equal(read(tmp_path, {WEIGHT: packed, WEIGHT + suffix: scale}, settings), expected)


def test_fp8_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    packed, _ = to_fp8(drawn(4, 4), (2, 2))
    powers = torch.tensor([[126, 127], [130, 120]], dtype=torch.uint8)
    expected = from_fp8(packed, torch.tensor([[0.5, 1], [8, 2**-7]]), (2, 2))
    for scale in (powers, powers.view(torch.float8_e8m0fnu)):
        assert torch.equal(read(tmp_path, {WEIGHT: packed, f"{WEIGHT}_scale_inv": scale}, fp8()), expected)


@pytest.mark.parametrize("halves", [False, True], ids=["one matrix", "a block for each half"])
def test_fp8_experts_in_one_tensor(halves: bool, tmp_path: Path) -> None:
    name, block = "model.layers.0.mlp.experts.gate_up_proj", (4, 4)
    weights = drawn(3, 12, 5)
    parts = [[to_fp8(half, block) for half in (expert.chunk(2) if halves else (expert,))] for expert in weights]
    packed, scales = (torch.stack([torch.cat([p[i] for p in expert]) for expert in parts]) for i in (0, 1))
    expected = [torch.cat([from_fp8(*part, block) for part in expert]) for expert in parts]
    with opened(tmp_path, {name: packed, f"{name}_scale_inv": scales}, fp8(block)) as reader:
        assert torch.equal(reader.weight(name), torch.stack(expected))
        assert reader.quantized is not None
        assert torch.equal(reader.quantized.read(reader, name, torch.float32, expert=2), expected[2])
        assert torch.equal(
            reader.quantized.read(reader, name, torch.bfloat16, expert=1), expected[1].to(torch.bfloat16)
        )


# MXFP4


STACK = "model.layers.2.mlp.experts.gate_up_proj"


def test_mxfp4_by_hand(tmp_path: Path) -> None:
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :2] = torch.tensor([0x21, 0x9F])
    tensors = {f"{STACK}_blocks": blocks, f"{STACK}_scales": torch.full((1, 1, 1), 128, dtype=torch.uint8)}
    found = read(tmp_path, tensors, {"quant_method": "mxfp4"}, STACK)
    assert found.shape == (1, 32, 1)
    assert found.flatten().tolist() == [1, 2, -12, -1] + [0] * 28


def test_every_four_bit_float() -> None:
    assert [e2m1(bits) for bits in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_mxfp4_experts(tmp_path: Path) -> None:
    blocks, scales = to_mxfp4(drawn(3, 64, 6))
    expected = from_mxfp4(blocks, scales)
    tensors = {f"{STACK}_blocks": blocks, f"{STACK}_scales": scales}
    with opened(tmp_path, tensors, {"quant_method": "mxfp4"}) as reader:
        assert torch.equal(reader.weight(STACK), expected)
        assert reader.quantized is not None
        assert torch.equal(reader.quantized.read(reader, STACK, torch.float32, expert=1), expected[1])


# compressed-tensors


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def test_packed_ints_by_hand(tmp_path: Path) -> None:
    tensors = {
        f"{STEM}.weight_packed": torch.tensor([[0xF7]], dtype=torch.int32),
        f"{STEM}.weight_scale": torch.tensor([[0.5]]),
        f"{STEM}.weight_zero_point": torch.tensor([[2 + 8]], dtype=torch.int32),
        f"{STEM}.weight_shape": torch.tensor([1, 3]),
    }
    settings = compressed("pack-quantized", strategy="group", group_size=3, symmetric=False)
    assert read(tmp_path, tensors, settings).tolist() == [[-1.5, 2.5, -5]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("strategy", ["group", "channel", "ordered"])
def test_packed_ints(bits: int, symmetric: bool, strategy: str, tmp_path: Path) -> None:
    rows, columns, group = 5, 24, 24 if strategy == "channel" else 8
    groups, count = columns // group, 1 << bits
    numbers, zeros = drawn(rows, columns, below=count), drawn(rows, groups, seed=1, below=count)
    scale = drawn(rows, groups, seed=2).abs() + 0.1
    order = torch.arange(columns) // group
    tensors = {
        f"{STEM}.weight_packed": words_along(numbers, bits, 1),
        f"{STEM}.weight_scale": scale,
        f"{STEM}.weight_shape": torch.tensor([rows, columns]),
    }
    if strategy == "ordered":
        order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        tensors[f"{STEM}.weight_g_idx"] = order.int()
    if not symmetric:
        tensors[f"{STEM}.weight_zero_point"] = words_along(zeros, bits, 0)
    offset = count // 2 if symmetric else zeros[:, order]  # both are stored above the same offset, which falls out
    settings = compressed(
        "pack-quantized",
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if strategy == "channel" else "group",
        group_size=None if strategy == "channel" else group,
        actorder="group" if strategy == "ordered" else None,
    )
    expected = (numbers - offset).float() * scale[:, order]
    assert torch.equal(read(tmp_path, tensors, settings), expected)


@pytest.mark.parametrize(
    ("strategy", "shape", "block"), [("channel", (6, 1), (1, 10)), ("tensor", (1,), (6, 10)), ("block", (2, 3), (4, 4))]
)
def test_float_quantized(strategy: str, shape: tuple[int, ...], block: tuple[int, int], tmp_path: Path) -> None:
    packed, _ = to_fp8(drawn(6, 10), (6, 10))
    scale = (drawn(*shape).abs() + 0.1).to(torch.bfloat16)
    settings = compressed("float-quantized", type="float", num_bits=8, strategy=strategy, block_structure=[4, 4])
    expected = from_fp8(packed, scale.reshape(-(-6 // block[0]), -(-10 // block[1])), block)
    assert torch.equal(read(tmp_path, {WEIGHT: packed, f"{STEM}.weight_scale": scale}, settings), expected)


def test_float_quantized_by_hand(tmp_path: Path) -> None:
    settings = compressed("int-quantized", num_bits=8, strategy="channel")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        stored = torch.tensor([[1, -2, 4]]).to(dtype)
        found = read(tmp_path, {WEIGHT: stored, f"{STEM}.weight_scale": torch.tensor([[0.25]])}, settings)
        assert found.tolist() == [[0.25, -0.5, 1]]


def test_groups_of_a_config_are_told_apart(tmp_path: Path) -> None:
    settings = compressed("pack-quantized", strategy="channel")
    other = {"targets": ["re:.*down_proj$"], "weights": {"type": "int", "num_bits": 8, "strategy": "channel"}}
    settings["config_groups"]["group_0"]["targets"] = ["re:.*up_proj$"]
    settings["config_groups"]["group_1"] = other
    down = STEM.replace("up_proj", "down_proj")
    tensors = {f"{stem}.weight_scale": torch.ones(1, 1) for stem in (STEM, down)}
    tensors |= {
        f"{stem}.weight_packed": torch.tensor([[0x87654321 - (1 << 32)]], dtype=torch.int32) for stem in (STEM, down)
    }
    with opened(tmp_path, tensors, settings) as reader:
        assert reader.weight(WEIGHT).tolist() == [[-7, -6, -5, -4, -3, -2, -1, 0]]
        assert reader.weight(f"{down}.weight").tolist() == [[0x21 - 128, 0x43 - 128, 0x65 - 128, 0x87 - 128]]


# GPTQ


def gptq(numbers_KN: torch.Tensor, zeros_GN: torch.Tensor, scale_GN: torch.Tensor, bits: int = 4) -> Tensors:
    return {
        f"{STEM}.qweight": words_along(numbers_KN, bits, 0),
        f"{STEM}.qzeros": words_along(zeros_GN, bits, 1),
        f"{STEM}.scales": scale_GN,
    }


def test_gptq_by_hand(tmp_path: Path) -> None:
    tensors = {
        f"{STEM}.qweight": torch.tensor([[0xF98]], dtype=torch.int32),
        f"{STEM}.qzeros": torch.tensor([[7]], dtype=torch.int32),
        f"{STEM}.scales": torch.tensor([[0.5]], dtype=torch.float16),
    }
    found = read(tmp_path, tensors, {"quant_method": "gptq", "bits": 4})
    assert found.tolist() == [[0, 0.5, 3.5, -4, -4, -4, -4, -4]]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True], ids=["in turn", "g_idx"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(version: str, ordered: bool, bits: int, tmp_path: Path) -> None:
    inputs, outputs, groups, count = 24, 10, 3, 1 << bits
    numbers, zeros = drawn(inputs, outputs, below=count), drawn(groups, outputs, seed=1, below=count)
    scale = (drawn(groups, outputs, seed=2).abs() + 0.1).half()
    order = torch.arange(inputs) // (inputs // groups)
    tensors = gptq(numbers, (zeros - int(version == "gptq")) % count, scale, bits)
    if ordered:
        order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
        tensors[f"{STEM}.g_idx"] = order.int()
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    assert torch.equal(read(tmp_path, tensors, settings), ((numbers - zeros[order]).float() * scale.float()[order]).T)


def test_gptq_groups_that_are_not_there(tmp_path: Path) -> None:
    tensors = gptq(torch.zeros(8, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8))
    tensors[f"{STEM}.g_idx"] = torch.tensor([0] * 7 + [1], dtype=torch.int32)
    with pytest.raises(BadCheckpoint, match=r"g_idx names groups 0 to 1 of 1") as caught:
        read(tmp_path, tensors, {"quant_method": "gptq", "bits": 4})
    assert (caught.value.layer, caught.value.expert) == (1, 3)
    assert caught.value.file == str(tmp_path / "model.safetensors")


# AWQ


def test_awq_by_hand(tmp_path: Path) -> None:
    tensors = {
        f"{STEM}.qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        f"{STEM}.qzeros": torch.tensor([[0]], dtype=torch.int32),
        f"{STEM}.scales": torch.ones(1, 8),
    }
    assert read(tmp_path, tensors, {"quant_method": "awq", "bits": 4}).tolist() == [[n] for n in range(8)]


def test_awq(tmp_path: Path) -> None:
    inputs, outputs, groups = 12, 16, 3
    numbers, zeros = drawn(inputs, outputs, below=16), drawn(groups, outputs, seed=1, below=16)
    scale = (drawn(groups, outputs, seed=2).abs() + 0.1).half()
    tensors = {
        f"{STEM}.qweight": awq_words(numbers),
        f"{STEM}.qzeros": awq_words(zeros),
        f"{STEM}.scales": scale,
    }
    order = torch.arange(inputs) // 4
    found = read(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    assert torch.equal(found, ((numbers - zeros[order]).float() * scale.float()[order]).T)


def test_the_slow_packers_are_their_own_inverse() -> None:
    numbers = drawn(6, 16, below=16)
    assert torch.equal(from_words(words_along(numbers, 4, 1), 4, 1), numbers)
    assert torch.equal(from_words(awq_words(numbers), 4, 1)[:, :8], numbers[:, list(AWQ_OUTPUTS)])


# What is not read.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"\[128\]"),
        (compressed("pack-quantized", num_bits=3), "3 bits"),
    ],
)
def test_variants_that_nothing_here_reads(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = gptq(torch.zeros(8, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8))
    tensors |= {f"{STEM}.weight_packed": torch.zeros(8, 1, dtype=torch.int32), f"{STEM}.weight_scale": torch.ones(8, 1)}
    with pytest.raises(UnsupportedModel, match=words) as caught:
        opened(tmp_path, tensors, settings)
    assert caught.value.file == str(tmp_path)
    assert caught.value.hint


# compressed-tensors' own package, where it is installed.


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [8, None], ids=["group", "channel"])
def test_packed_ints_as_their_own_package_packs_them(symmetric: bool, group: int | None, tmp_path: Path) -> None:
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    groups = 24 // (group or 24)
    state = {"weight": drawn(10, 24), "weight_scale": drawn(10, groups, seed=1).abs() + 0.1}
    state["weight_zero_point"] = (drawn(10, groups, seed=2, below=16) - 8).to(torch.int8)
    if symmetric:
        state["weight_zero_point"].zero_()
    packed = package.PackedQuantizationCompressor.compress(state, scheme)
    expected = package.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    tensors = {f"{STEM}.{name}": tensor for name, tensor in packed.items()}
    settings = compressed(
        "pack-quantized", symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    assert torch.equal(read(tmp_path, tensors, settings), expected.float())
