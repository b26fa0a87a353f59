"""`moekit export` as a user calls it, in Python and in a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

import moekit as api
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from tests.commands import Moekit
from tests.exporting import rounded
from tests.tiny import write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model at four bits, and one that is not rounded."""
    folder = tmp_path_factory.mktemp("made")
    rounded(folder / "four", "qwen3_moe", 4)
    write_model(folder / "plain", "qwen3_moe")
    return folder


def test_it_says_what_was_packed_and_answers_as_the_python_call_does(
    moekit: Moekit, made: Path, tmp_path: Path
) -> None:
    done = moekit("export", made / "four", "--to", "compressed-tensors", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    for words in (
        "matrices of experts: 48 of 4 bits",
        "32 inputs share a scale; every matrix gave back its weights before it was written, bit for bit",
        "proven: every tensor is byte for byte the recorded one",
    ):
        assert words in done.out, words
    asked = moekit(
        "export", made / "four", "--to", "compressed-tensors", "-o", tmp_path / "out", "--overwrite", "--json"
    )
    called = api.export(made / "four", to="compressed-tensors", out=tmp_path / "called")
    assert asked.json == json.loads(json.dumps({**called.to_dict(), "out": str(tmp_path / "out")}))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "called" / "model.safetensors"
    ).read_bytes()


def test_a_recipe_rounds_and_packs(made: Path, tmp_path: Path) -> None:
    settings = {"group": 8, "symmetric": True}
    steps = [
        {"use": "quantize", "id": "four", "model": str(made / "plain"), "method": "rtn", "bits": 4, "proof": False}
        | {"settings": settings},
        {"use": "export", "id": "packed", "model": "${steps.four}", "to": "compressed-tensors"},
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "short", "out": str(tmp_path / "run"), "steps": steps}))
    done = runner.run(load_recipe(file)).done
    assert done["packed"].results["matrices"] == {"4 bits": 48}
    assert api.check(tmp_path / "run" / "packed").ok


def test_a_dry_run_tells_the_size_and_refusals_name_the_way_out(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("export", made / "four", "--to", "auto-round", "-o", tmp_path / "out")
    done = moekit(*command, "--dry-run", "--json")
    written = api.export(made / "four", to="auto-round", out=tmp_path / "real").bytes["after"]
    assert written < done.json["disk_bytes"] <= written + (16 << 20)
    done = moekit("export", made / "plain", "--to", "auto-round", "-o", tmp_path / "out")
    assert done.code == 2
    assert "--set symmetric=true" in done.err
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = moekit("export", made / "plain", "--to", "gguf", "-o", tmp_path / "out")
    assert done.code == 2
    assert "pip install 'moekit[export]'" in done.err
    done = moekit(*command[:-2], "-o", made / "four")
    assert done.code == 2
    assert "which is read" in done.err
    assert not (tmp_path / "out").exists()
