"""`--repair least-squares` of `moekit prune` and `moekit merge`: from the command line, a recipe and Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import moekit as api
from moekit.errors import BadConfig
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from tests.commands import Moekit
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=20)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_only_down_projections_change_and_plan_record_and_proof_tell(
    moekit: Moekit, made: Path, tmp_path: Path
) -> None:
    asked = ["prune", made / "moe", "--method", "reap", "--keep", "0.5", "--data", made / "text", "--max-tokens", 400]
    bare = moekit(*asked, "--no-proof", "-o", tmp_path / "bare")
    assert bare.code == 0, bare.err
    how = ("--repair", "least-squares", "--proof-tokens", 200, "--plan", tmp_path / "p.json")
    done = moekit(*asked, *how, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    for layer in done.json["layers"]:
        assert layer["figures"]["repaired"] < layer["figures"]["unrepaired"]
    assert done.json["repair"] == {"use": "least-squares", "ridge": None, "sweeps": 3}
    one, two = tensors_of(tmp_path / "bare"), tensors_of(tmp_path / "out")
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}
    assert changed == {name for name in one if "down_proj" in name and "experts" in name}
    record = json.loads((tmp_path / "out" / "moekit.json").read_text())
    assert record["config"]["repair"] == done.json["repair"]
    assert set(record["scores"]["proof"]["perplexity"]) >= {"reap", "frequency", "random"}
    assert moekit("check", tmp_path / "out", "--parent", made / "moe").code == 0
    assert json.loads((tmp_path / "p.json").read_text())["repair"] == done.json["repair"]
    told = moekit("apply", tmp_path / "p.json", "--no-proof", "-o", tmp_path / "again")
    assert told.code == 2
    assert "--repair ..." in told.err
    assert not (tmp_path / "again").exists()


def test_a_recipe_merges_and_repairs_as_python_does(made: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "m-smoe", "keep": 0.5, "data": str(made / "text"), "max_tokens": 400}
    how |= {"repair": "least-squares", "ridge": 0.1, "proof": False}
    body = {"name": "r", "out": str(tmp_path / "run"), "steps": [{"use": "merge", "model": str(made / "moe"), **how}]}
    body["steps"][0]["id"] = "mended"  # type: ignore[index]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(body))
    assert runner.run(load_recipe(tmp_path / "r.yaml")).ran == ["mended"]
    result = api.merge(made / "moe", **how, out=tmp_path / "out")
    assert result.repair == {"use": "least-squares", "ridge": 0.1, "sweeps": 3}
    one, two = tensors_of(tmp_path / "run" / "mended"), tensors_of(tmp_path / "out")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    plain = api.merge(made / "moe", **(how | {"repair": "none", "ridge": None}), out=tmp_path / "plain")
    assert plain.repair is None
    assert plain.plan != result.plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": None, "trace": "trace"}, "measured on text"),
        ({"method": "random", "data": None}, "measured on text"),
        ({"method": "mone"}, "does not follow"),
        ({"repair": "none", "ridge": 0.1}, "nothing is repaired"),
    ],
)
def test_what_is_impossible_is_refused(made: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"method": "reap", "repair": "least-squares", "data": made / "text", "proof": False}
    with pytest.raises(BadConfig, match=words):
        api.prune(made / "moe", keep=0.5, **(asked | options), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
