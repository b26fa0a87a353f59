"""Quantized weights made and read back number by number, as the formats' definitions say; slow, apart from moekit.

Every reader here is a plain loop over Python numbers: eight- and four-bit floats are decoded from their bits by the
formula, words are taken apart as Python integers. Legend: N rows (outputs), K columns (inputs), E experts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_json

Tensors = dict[str, torch.Tensor]

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(byte: int) -> float:
    """An eight-bit float: sign, four bits of exponent with bias 7, three of mantissa; 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def e2m1(bits: int) -> float:
    """A four-bit float: sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def product(number: float, scale: float) -> float:
    """A product rounded once to float32."""
    return float(np.float32(number) * np.float32(scale))


# fp8 with scales of blocks, rows or whole tensors.


def to_fp8(weight_NK: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scales; each block's largest number becomes 448."""
    rows, columns = weight_NK.shape
    packed = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    scale_nk = torch.ones(-(-rows // block[0]), -(-columns // block[1]))
    for n in range(scale_nk.shape[0]):
        for k in range(scale_nk.shape[1]):
            place = slice(n * block[0], (n + 1) * block[0]), slice(k * block[1], (k + 1) * block[1])
            scale_nk[n, k] = max(float(weight_NK[place].abs().max()), 1e-6) / 448
            packed[place] = (weight_NK[place] / scale_nk[n, k]).to(torch.float8_e4m3fn)
    return packed, scale_nk


def from_fp8(packed_NK: torch.Tensor, scale_nk: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Each number times the scale of the block that it lies in."""
    raw = packed_NK.view(torch.uint8).tolist()
    scales = scale_nk.float().tolist()

    def number(n: int, k: int) -> float:
        return product(e4m3(raw[n][k]), scales[n // block[0]][k // block[1]])

    return torch.tensor([[number(n, k) for k in range(len(raw[0]))] for n in range(len(raw))])


# MXFP4, as GPT-OSS's files have it.


def to_mxfp4(weight_EKN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [E, N, K / 32, 16] and scales [E, N, K / 32] of a parameter whose inputs come first."""
    experts, inputs, outputs = weight_EKN.shape
    blocks = torch.zeros(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(experts, outputs, inputs // 32, dtype=torch.uint8)
    for e in range(experts):
        for n in range(outputs):
            for g in range(inputs // 32):
                numbers = weight_EKN[e, g * 32 : (g + 1) * 32, n].tolist()
                exponent = math.ceil(math.log2(max(map(abs, numbers)) / 6))
                scales[e, n, g] = exponent + 127
                codes = [_nearest(number / 2.0**exponent) for number in numbers]
                blocks[e, n, g] = torch.tensor([codes[2 * b] + 16 * codes[2 * b + 1] for b in range(16)])
    return blocks, scales


def _nearest(number: float) -> int:
    code = min(range(8), key=lambda c: abs(FP4[c] - abs(number)))
    return code + 8 * (number < 0)


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The parameter [E, K, N]: low four bits first, times two to the scale less 127."""
    made = []
    for expert, exponents in zip(blocks.tolist(), scales.tolist(), strict=True):
        rows = [
            [e2m1(code) * 2.0 ** (power - 127) for group, power in zip(row, powers, strict=True) for byte in group
             for code in (byte & 15, byte >> 4)]
            for row, powers in zip(expert, exponents, strict=True)
        ]  # fmt: skip
        made.append(torch.tensor(rows).T)
    return torch.stack(made)


# Whole numbers in words.


def to_word(numbers: list[int], bits: int) -> int:
    """Numbers in one 32-bit word, the first in the lowest bits, as a signed integer."""
    word = sum(number << (bits * place) for place, number in enumerate(numbers))
    return word - (1 << 32) if word >= 1 << 31 else word


def words_along(numbers: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Unsigned numbers [A, B] packed along an axis, int32; what is lacking to a whole word is zero."""
    count = 32 // bits
    turned = numbers.T if axis == 0 else numbers
    rows = [row + [0] * (-len(row) % count) for row in turned.tolist()]
    made = torch.tensor([[to_word(r[i : i + count], bits) for i in range(0, len(r), count)] for r in rows])
    return (made.T if axis == 0 else made).to(torch.int32).contiguous()


def from_words(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The other way round, int64."""
    turned = words.T if axis == 0 else words
    mask, places = (1 << bits) - 1, range(0, 32, bits)
    made = torch.tensor([[(w & 0xFFFFFFFF) >> p & mask for w in row for p in places] for row in turned.tolist()])
    return made.T if axis == 0 else made


# The order in which AWQ packs eight outputs, lowest bits first.
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_words(numbers_XN: torch.Tensor) -> torch.Tensor:
    """Unsigned four-bit numbers [X, N] as AWQ packs them, [X, N / 8]."""
    rows = numbers_XN.tolist()
    made = [[to_word([r[i + o] for o in AWQ_OUTPUTS], 4) for i in range(0, len(r), 8)] for r in rows]
    return torch.tensor(made).to(torch.int32)


# Whole folders.


def requantized(
    folder: Path, settings: Mapping[str, Any], pack: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None]
) -> Path:
    """Quantize a plain folder where it lies, and lay the same model in floats beside it.

    Args:
        folder: of one shard.
        settings: for `quantization_config`.
        pack: name, weight -> tensors in its place and what they stand for; None leaves it as it is.

    Returns:
        The folder beside it, of the numbers that the packed weights stand for, by the slow readers.
    """
    beside = folder.parent / f"{folder.name}-as-floats"
    beside.mkdir()
    packed: Tensors = {}
    floats: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        made = pack(name, weight)
        packed |= {name: weight} if made is None else made[0]
        floats[name] = weight if made is None else made[1]
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (beside / file.name).write_bytes(file.read_bytes())
    for place, tensors in ((folder, packed), (beside, floats)):
        made_contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(made_contiguous, place / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=dict(settings)))
    return beside


def fp8_settings(block: tuple[int, int]) -> dict[str, Any]:
    """As DeepSeek's files say it."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}


def fp8_packer(block: tuple[int, int]) -> Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None]:
    """Quantizes what DeepSeek's files have in fp8: all linear layers but routers and the head."""

    def pack(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if weight.dim() != 2 or ".layers." not in name or name.endswith(("mlp.gate.weight", "eh_proj.weight")):
            return None
        packed, scale = to_fp8(weight, block)
        return {name: packed, f"{name}_scale_inv": scale}, from_fp8(packed, scale, block)

    return pack


MXFP4_SETTINGS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def mxfp4_packer(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
    """Quantizes the experts' matrices, as GPT-OSS's files have them."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    blocks, scales = to_mxfp4(weight)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, from_mxfp4(blocks, scales)


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a folder."""
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def quantization_of(folder: Path) -> dict[str, Any]:
    """What a folder's config says of its quantization."""
    told: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return told
