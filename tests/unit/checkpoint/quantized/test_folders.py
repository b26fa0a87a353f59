"""Quantized folders as a whole: what they hold is compared with the config, and broken scales are found at once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.checking import check
from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.quantized.weights import QuantizedWeights, WeightReader, quantized_weights
from moekit.checkpoint.reading import TensorReader
from moekit.errors import BadCheckpoint, UnsupportedModel
from moekit.streaming.loader import LayerLoader
from tests.checkpoints import edit_json, edit_shard, plain
from tests.quantizing import (
    MXFP4_SETTINGS,
    Tensors,
    fp8_packer,
    fp8_settings,
    mxfp4_packer,
    requantized,
    tensors_of,
)

BLOCK = (16, 16)  # 24, 12 and 40 are no multiples of it
DOWN = "model.layers.1.mlp.experts.5.down_proj.weight"
STACK = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp8 DeepSeek-V3 and an MXFP4 GPT-OSS, each with the same model in floats beside it."""
    folder = tmp_path_factory.mktemp("quantized")
    requantized(plain(folder / "fp8", "deepseek_v3"), fp8_settings(BLOCK), fp8_packer(BLOCK))
    gpt = plain(folder / "mxfp4", "gpt_oss", hidden_size=64, intermediate_size=32)
    requantized(gpt, MXFP4_SETTINGS, mxfp4_packer)
    return folder


def damaged(made: Path, kind: str, tmp_path: Path, change: Callable[[Tensors], Any]) -> Checkpoint:
    folder = shutil.copytree(made / kind, tmp_path / kind)
    edit_shard(folder / "model.safetensors", change)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_layers_are_those_of_the_model_in_floats(made: Path, kind: str) -> None:
    packed, floats = (LayerLoader(Checkpoint.open(made / name)) for name in (kind, f"{kind}-as-floats"))
    for index in range(packed.layers):
        mine, other = (loader.load(index).state_dict() for loader in (packed, floats))
        assert sorted(mine) == sorted(other)
        for name, tensor in other.items():
            assert torch.equal(mine[name], tensor), name
    packed.load_rest()
    half = LayerLoader(Checkpoint.open(made / kind), dtype=torch.bfloat16)
    name = "mlp.experts.down_proj"
    assert torch.equal(half.load(1).get_parameter(name), packed.layer(1).get_parameter(name).bfloat16())
    assert half.load(1).get_parameter(name).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_sound_folder_is_verified_and_checked(made: Path, kind: str) -> None:
    checkpoint = Checkpoint.open(made / kind)
    verify(checkpoint)
    found = quantized_weights(checkpoint)
    assert found is not None
    assert sorted(found.tensors) == sorted(tensors_of(made / f"{kind}-as-floats"))
    report = check(made / kind)
    assert report.ok, report.findings


def fused(tensors: Tensors) -> None:
    """As transformers writes fp8 experts, stacked."""
    block = "model.layers.1.mlp.experts"

    def stack(part: str, ending: str) -> torch.Tensor:
        made = torch.stack([tensors.pop(f"{block}.{e}.{part}.weight{ending}") for e in range(8)])
        return made if ending else made.view(torch.uint8)  # torch joins no eight-bit floats

    for ending, kind in (("", torch.float8_e4m3fn), ("_scale_inv", torch.float32)):
        both = torch.cat([stack("gate_proj", ending), stack("up_proj", ending)], dim=1)
        tensors[f"{block}.gate_up_proj{ending}"] = both.view(kind)
        tensors[f"{STACK}{ending}"] = stack("down_proj", ending).view(kind)


def test_stacked_experts_in_fp8(made: Path, tmp_path: Path) -> None:
    checkpoint = damaged(made, "fp8", tmp_path, fused)
    verify(checkpoint)
    mine = LayerLoader(checkpoint).load(1).state_dict()
    other = LayerLoader(Checkpoint.open(made / "fp8")).load(1).state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.items())


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name])

    return change


def filled(number: float, *place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = number
        return tensor

    return change


DAMAGES: list[tuple[str, Callable[[Tensors], Any], str, int | None]] = [
    ("fp8", lambda t: t.pop(f"{DOWN}_scale_inv"), rf"{re.escape(DOWN)}_scale_inv", 5),
    ("fp8", lambda t: t.pop(DOWN), r"scale_inv scales a weight that is missing", 5),
    ("fp8", put(DOWN, lambda w: w.float()), r"scale_inv scales a weight that is missing or not quantized", 5),
    (
        "fp8",
        put(f"{DOWN}_scale_inv", lambda s: s[:1]),
        r"_scale_inv has shape \[1, 2\] instead of \[2, 2\]",
        5,
    ),
    ("fp8", put(f"{DOWN}_scale_inv", lambda s: s.int()), r"is I32 instead of", 5),
    ("fp8", put(DOWN, lambda w: w[:, :20]), r"down_proj.weight \[32, 20\] instead of \[32, 24\]", 5),
    ("fp8", put(f"{DOWN}_scale_inv", filled(float("nan"), 0, 1)), r"down_proj.weight_scale_inv holds NaN", 5),
    ("fp8", put(f"{DOWN}_scale_inv", filled(0, 1, 1)), r"down_proj.weight_scale_inv holds zero", 5),
    ("fp8", put(f"{DOWN}_scale_inv", filled(-1, 1, 1)), r"down_proj.weight_scale_inv holds negatives", 5),
    ("fp8", put(f"{DOWN}_scale_inv", filled(float("inf"), 1, 1)), r"down_proj.weight_scale_inv holds infinity", 5),
    (
        "fp8",
        lambda t: (t.pop(f"{DOWN}_scale_inv"), t.update({DOWN: t[DOWN].to(torch.bfloat16)})),
        r"down_proj.weight is quantized \(fp8\) like others of its kind, but it is BF16 and has no scales",
        5,
    ),
    ("mxfp4", lambda t: t.pop(f"{STACK}_scales"), r"down_proj_scales is missing", None),
    ("mxfp4", lambda t: t.pop(f"{STACK}_blocks"), r"down_proj_scales scales a weight that is missing", None),
    ("mxfp4", put(f"{STACK}_scales", lambda s: s[:, :-1]), r"_scales has shape \[8, 63, 1\] instead of", None),
    ("mxfp4", put(f"{STACK}_blocks", lambda b: b[:, :-1]), r"_scales has shape \[8, 64, 1\] instead of", None),
    ("mxfp4", put(f"{STACK}_blocks", lambda b: b[..., :8]), r"_blocks has shape \[8, 64, 1, 8\] instead of", None),
    ("mxfp4", put(f"{STACK}_scales", filled(255, 6, 3, 0)), r"down_proj_scales holds NaN", 6),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "words", "expert"), DAMAGES)
def test_damage_is_found_as_the_folder_is_verified(
    kind: str, change: Callable[[Tensors], Any], words: str, expert: int | None, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadCheckpoint, match=words) as caught:
        verify(damaged(made, kind, tmp_path, change))
    assert (caught.value.layer, caught.value.expert) == (1, expert)
    assert str(tmp_path) in str(caught.value.file)


def test_scales_beyond_the_first_ones_are_looked_at_as_their_layer_is_read(made: Path, tmp_path: Path) -> None:
    checkpoint = damaged(made, "fp8", tmp_path, put(f"{DOWN}_scale_inv", filled(0, 0, 0)))
    found = quantized_weights(checkpoint)
    assert isinstance(found, QuantizedWeights)
    with TensorReader(checkpoint) as reader:
        found.check_values(reader, limit=64)
    loader = LayerLoader(checkpoint)
    loader.load(0)
    with pytest.raises(BadCheckpoint, match="holds zero") as caught:
        loader.load(1)
    assert (caught.value.layer, caught.value.expert) == (1, 5)


def test_a_config_that_announces_what_is_not_there(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "fp8-as-floats", tmp_path / "floats")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=fp8_settings(BLOCK)))
    with pytest.raises(BadCheckpoint, match=r"quantized \(fp8\), but no tensor is"):
        verify(Checkpoint.open(folder))


@pytest.mark.parametrize("entry", ["model.layers.1.mlp.experts.5.down_proj", "re:.*experts.5.down_proj$"])
def test_modules_that_a_config_lists_may_stay_as_they_are(entry: str, made: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[f"{DOWN}_scale_inv"]
        tensors[DOWN] = tensors[DOWN].to(torch.bfloat16)

    checkpoint = damaged(made, "fp8", tmp_path, change)
    edit_json(checkpoint.path / "config.json", lambda c: c["quantization_config"].update(ignore=[entry]))
    checkpoint = Checkpoint.open(checkpoint.path)
    verify(checkpoint)
    with WeightReader(checkpoint) as reader:
        assert reader.weight(DOWN).dtype == torch.bfloat16
    assert LayerLoader(checkpoint).load(1).get_parameter("mlp.experts.down_proj").dtype == torch.float32


def test_what_nothing_here_reads_is_said_where_layers_are_run(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "fp8-as-floats", tmp_path / "other")
    edit_json(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    verify(Checkpoint.open(folder))
    with pytest.raises(UnsupportedModel, match=r"quantized \(bitsandbytes\), which nothing here reads"):
        LayerLoader(Checkpoint.open(folder))


# Stock transformers, with its own quantizer.


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs fp8 itself")
def test_loading_whole_says_where_transformers_would_misread(made: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"misreads model\.layers\.0\..*its last block of 16 x 16") as caught:
        moekit.load(made / "fp8", device="cpu")
    assert "moekit profile" in str(caught.value.hint)


def test_loading_whole_says_what_works_where_the_quantizer_does_not(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "mxfp4-as-floats", tmp_path / "packed")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=settings))
    with pytest.raises(
        UnsupportedModel, match=r"cannot load weights that are quantized so \(bitsandbytes\) here"
    ) as caught:
        moekit.load(folder, device="cpu")
    assert "layer by layer" in str(caught.value.hint)
