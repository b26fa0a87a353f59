"""Adapters kept beside the merged model: peft loads them onto the parent, and it answers as the merged model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import moekit as api
from moekit.errors import BadConfig
from tests.commands import Moekit
from tests.families import build, logits
from tests.tiny import tokenizer, write_text

SHORT: dict[str, Any] = {"steps": 2, "seq_len": 16, "batch": 2, "warmup": 0, "precision": "fp32", "lr": 0.02}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with shared experts, one without, a text."""
    folder = tmp_path_factory.mktemp("made")
    for family in ("qwen2_moe", "qwen3_moe"):
        build(family).save_pretrained(folder / family)
        tokenizer().save_pretrained(folder / family)
    write_text(folder / "text", documents=8)
    return folder


def learnt(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def with_adapter(parent: Path, adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    return logits(PeftModel.from_pretrained(base, adapter).eval())


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("qwen2_moe", ["attention", "shared"]),
        ("qwen3_moe", ["experts", "router"]),
        pytest.param("qwen3_moe", ["attention"], marks=(pytest.mark.full, pytest.mark.slow)),
    ],
)
def test_the_parent_with_the_adapter_answers_as_the_merged_model(
    family: str, parts: list[str], made: Path, tmp_path: Path
) -> None:
    lora = {"rank": 2, "parts": parts}
    settings = SHORT | {"lora": lora}
    api.train(
        made / family, data=made / "text", settings=settings, keep_adapter=tmp_path / "kept", out=tmp_path / "out"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept", "out"]
    assert sorted(f.name for f in (tmp_path / "kept").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    told = json.loads((tmp_path / "kept" / "adapter_config.json").read_text())
    assert (told["r"], told["base_model_name_or_path"]) == (2, str(made / family))
    merged = learnt(tmp_path / "out")
    assert (merged - learnt(made / family)).abs().max() > 1e-3, "something was learnt"
    torch.testing.assert_close(with_adapter(made / family, tmp_path / "kept"), merged, atol=1e-4, rtol=1e-4)


def test_heal_keeps_its_adapter_and_refuses_to_lose_one(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    api.prune(made / "qwen3_moe", method="random", keep=0.5, proof=False, out=tmp_path / "half")
    given = ("heal", tmp_path / "half", "--data", made / "text", "--no-proof", "--steps", 1, "--seq-len", 16)
    kept = tmp_path / "kept"
    done = moekit(*given, "--what", "lora", "--lr", 0.02, "--keep-adapter", kept, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    merged = learnt(tmp_path / "out")
    torch.testing.assert_close(with_adapter(tmp_path / "half", kept), merged, atol=1e-4, rtol=1e-4)
    again = moekit(*given, "--what", "lora", "--keep-adapter", kept, "-o", tmp_path / "again")
    assert again.code != 0
    assert "exists" in again.err
    none = moekit(*given, "--keep-adapter", tmp_path / "none", "-o", tmp_path / "again")
    assert none.code != 0
    assert "an adapter is to be kept, but none trains" in none.err
    assert not (tmp_path / "again").exists()


def test_an_adapter_without_lora_or_in_the_folder_of_the_model_is_refused(made: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": made / "text", "out": tmp_path / "out"}
    with pytest.raises(BadConfig, match="none trains"):
        api.train(made / "qwen3_moe", settings=SHORT, keep_adapter=tmp_path / "kept", **given)
    settings = SHORT | {"lora": {"rank": 2}}
    with pytest.raises(BadConfig, match="lies in"):
        api.train(made / "qwen3_moe", settings=settings, keep_adapter=tmp_path / "out" / "adapter", **given)
