"""Quantized folders on the command line: measured, decided on, proven and cut without an original in full precision."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import moekit as library
from moekit.checkpoint.folder import Checkpoint
from moekit.streaming.loader import LayerLoader
from moekit.trace import Trace
from tests.checkpoints import edit_json, edit_shard
from tests.commands import Moekit
from tests.contracts import FULL
from tests.families import tokens
from tests.quantizing import (
    MXFP4_SETTINGS,
    fp8_packer,
    fp8_settings,
    mxfp4_packer,
    quantization_of,
    requantized,
    tensors_of,
)
from tests.tiny import write_model, write_text

# 24 columns and 12 rows are whole blocks of 4; of 16 the last one is cut off.
BLOCKS = {"fp8": (4, 4), "ragged": (16, 16)}
KINDS = ["fp8", "ragged", "mxfp4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized models, each with the same model in floats beside it, and a text."""
    folder = tmp_path_factory.mktemp("made")
    for name, block in BLOCKS.items():
        requantized(write_model(folder / name, "deepseek_v3"), fp8_settings(block), fp8_packer(block))
    gpt = write_model(folder / "mxfp4", "gpt_oss", hidden_size=64, intermediate_size=32)
    requantized(gpt, MXFP4_SETTINGS, mxfp4_packer)
    write_text(folder / "my-domain", documents=6)
    return folder


def prune(made: Path, kind: str, *options: object, method: str = "reap") -> list[Any]:
    return [
        "prune",
        made / kind,
        "--method",
        method,
        "--keep",
        4,
        "--data",
        made / "my-domain",
        "--max-tokens",
        1024,
        *options,
    ]


def scores(plan: Path) -> dict[str, list[float]]:
    """Layer -> scores, as the plan tells them."""
    return {layer: told["scores"] for layer, told in json.loads(plan.read_text())["layers"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_in_floats(kind: str, moekit: Moekit, made: Path, tmp_path: Path) -> None:
    for name in (kind, f"{kind}-as-floats"):
        done = moekit(*prune(made, name, "--plan", tmp_path / f"{name}.json"))
        assert done.code == 0, done.err
    mine, other = scores(tmp_path / f"{kind}.json"), scores(tmp_path / f"{kind}-as-floats.json")
    assert list(mine) == list(other)
    for layer in mine:
        assert mine[layer] == pytest.approx(other[layer], rel=1e-5)
        assert len(set(mine[layer])) > 1


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in ("fp8", "mxfp4") else FULL) for k in KINDS])
def test_it_is_proven_and_cut_in_its_own_bytes(kind: str, moekit: Moekit, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = moekit(*prune(made, kind, "--plan", tmp_path / "p.json", "-o", out, "--json"))
    assert done.code == 0, done.err
    floats = moekit(*prune(made, f"{kind}-as-floats", "-o", tmp_path / "floats", "--json"))
    mine, other = (d.json["proof"]["method"]["text"]["overall"] for d in (done, floats))
    assert mine["b"]["perplexity"] == pytest.approx(other["b"]["perplexity"], rel=1e-5)
    assert done.json["check"]["ok"] is True
    kept = {layer["layer"]: layer["kept"] for layer in done.json["layers"]}
    assert kept == {layer["layer"]: layer["kept"] for layer in floats.json["layers"]}
    before, after = tensors_of(made / kind), tensors_of(out)
    expected = rows_kept(before, kept)
    assert sorted(after) == sorted(expected)
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert quantization_of(out) == quantization_of(made / kind)
    loaded = logits_by_layers(out)
    torch.testing.assert_close(loaded, logits_by_layers(tmp_path / "floats"), rtol=0, atol=1e-5)


def rows_kept(tensors: dict[str, torch.Tensor], kept: dict[int, list[int]]) -> dict[str, torch.Tensor]:
    """What must come out, by slices made here."""
    made = {}
    for name, tensor in tensors.items():
        layer = int(re.findall(r"layers\.(\d+)", f"{name} layers.-1".replace("-1", "999"))[0])
        numbered = re.search(r"\.experts\.(\d+)\.", name)
        if layer not in kept:
            made[name] = tensor
        elif numbered:
            expert = int(numbered[1])
            if expert in kept[layer]:
                made[name.replace(numbered[0], f".experts.{kept[layer].index(expert)}.")] = tensor
        elif re.search(r"\.experts\.|mlp\.gate\.|mlp\.router\.", name):
            bytes_of = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            made[name] = bytes_of[kept[layer]].contiguous().view(tensor.dtype)
        else:
            made[name] = tensor
    return made


def logits_by_layers(folder: Path) -> torch.Tensor:
    """Logits of a folder whose layers are loaded by moekit, through the family's own class."""
    loader = LayerLoader(Checkpoint.open(folder), dtype=torch.float32, device="cpu")
    for index in range(loader.layers):
        loader.load(index)
    loader.load_rest()
    with torch.no_grad():
        found: torch.Tensor = loader.model(tokens()).logits
    return found


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", pytest.param("mxfp4", marks=FULL)])
def test_stock_transformers_loads_what_was_cut(kind: str, moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*prune(made, kind, "-o", tmp_path / "out", "--no-proof"))
    assert done.code == 0, done.err
    wanted = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[kind](dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=wanted)
    with torch.no_grad():
        found = stock.eval()(tokens()).logits
    torch.testing.assert_close(found, logits_by_layers(tmp_path / "out"), rtol=0, atol=1e-5)
    # The same experts taken out of the model in floats.
    assert moekit(*prune(made, f"{kind}-as-floats", "-o", tmp_path / "floats", "--no-proof")).code == 0
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found, floats(tokens()).logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        mine = library.load(tmp_path / "out", dtype="float32", device="cpu")(tokens()).logits
    torch.testing.assert_close(mine, found, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.slow
def test_a_profile_streams(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    for name in ("ragged", "ragged-as-floats"):
        done = moekit("profile", made / name, "--data", made / "my-domain", "-o", tmp_path / name)
        assert done.code == 0, done.err
    mine, other = (Trace.load(tmp_path / name) for name in ("ragged", "ragged-as-floats"))
    assert mine.meta.tokens == other.meta.tokens
    for layer in other.meta.layers:
        assert torch.equal(mine.indices(layer), other.indices(layer))
    assert moekit("prune", made / "ragged", "--trace", tmp_path / "ragged", "--method", "frequency", "--keep", 4,
                  "--no-proof", "-o", tmp_path / "out").code == 0  # fmt: skip


@pytest.mark.full
@pytest.mark.slow
def test_super_experts_and_expert_sets(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit("super-experts", made / "ragged", "--data", made / "my-domain", "-o", tmp_path / "super")
    assert done.code == 0, done.err
    done = moekit("expert-sets", made / "ragged", "--data", made / "my-domain", "-o", tmp_path / "sets")
    assert done.code == 0, done.err


@pytest.mark.parametrize("method", ["dern", "uncurl"])
def test_methods_that_change_weights_are_refused_before_any_work(
    method: str, moekit: Moekit, made: Path, tmp_path: Path
) -> None:
    done = moekit(*prune(made, "fp8", "-o", tmp_path / "out", method=method))
    assert done.code == 2
    assert done.says(r"quantized \(fp8\): they can be dropped, but not changed and quantized again")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.slow
def test_multi_token_prediction_layers_are_cut_by_their_own_routers(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "ragged-as-floats", tmp_path / "source")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = tensors[name].flip(0)
        ones = {"enorm": torch.ones(32), "hnorm": torch.ones(32), "eh_proj": torch.eye(32, 64)}
        tensors.update({f"model.layers.3.{name}.weight": tensor for name, tensor in ones.items()})

    edit_shard(folder / "model.safetensors", add)
    edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    requantized(folder, fp8_settings((16, 16)), fp8_packer((16, 16)))
    taken = {}
    for name in ("source", "source-as-floats"):
        options = ("--mtp", "prune", "--no-proof", "-o", tmp_path / f"{name}-out", "--plan", tmp_path / f"{name}.json")
        done = moekit("prune", tmp_path / name, "--method", "reap", "--keep", 4, "--data", made / "my-domain", *options)
        assert done.code == 0, done.err
        taken[name] = json.loads((tmp_path / f"{name}.json").read_text())["mtp"]
    assert taken["source"].keys() == taken["source-as-floats"].keys() == {"model.layers.3."}
    mine, other = (taken[name]["model.layers.3."] for name in taken)
    assert mine == pytest.approx(other, rel=1e-5)


def test_what_cannot_be_read_is_refused_with_the_way_out(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "fp8-as-floats", tmp_path / "other")
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=settings))
    command, text = ["prune", folder, "--keep", 4, "-o", tmp_path / "out"], ["--data", made / "my-domain"]
    done = moekit(*command, "--method", "random", *text)
    assert done.code == 2
    assert done.says(r"quantized \(bitsandbytes\), which nothing here reads, and layers have to be run.*--no-proof")
    assert moekit(*command, "--method", "reap", *text, "--no-proof").code == 2
    assert moekit(*command, "--method", "random", "--no-proof").code == 0
