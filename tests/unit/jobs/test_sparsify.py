"""`use: sparsify`: what it may not write over, and what keeps its zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import moekit
from moekit.errors import BadConfig
from moekit.jobs.options.sparsify import SparsifyOptions
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a plan of zeros."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=4)
    moekit.sparsify(folder / "moe", method="magnitude", sparsity=0.5, proof=False, plan=folder / "p.json")
    return folder


def zeros(folder: Path) -> int:
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    return sum(int((t == 0).sum()) for name, t in tensors.items() if "experts" in name)


def test_the_model_that_a_plan_names_is_an_input(made: Path) -> None:
    asked = SparsifyOptions(from_plan=made / "p.json")
    assert ("model", str(made / "moe")) in asked.inputs()
    with pytest.raises(BadConfig, match="replace"):
        moekit.sparsify(from_plan=made / "p.json", proof=False, out=made / "moe", overwrite=True)


@pytest.mark.slow
def test_training_the_router_alone_keeps_the_zeros(made: Path, tmp_path: Path) -> None:
    moekit.sparsify(from_plan=made / "p.json", proof=False, out=tmp_path / "sparse")
    before = zeros(tmp_path / "sparse")
    assert before > 0
    settings = {"steps": 1, "seq_len": 32, "batch": 2, "lr": 0.01, "warmup": 0}
    for parts, kept in ((("router",), True), (("router", "experts"), False)):
        out = tmp_path / "-".join(parts)
        moekit.train(tmp_path / "sparse", data=made / "text", settings={**settings, "parts": parts}, out=out)
        assert (zeros(out) == before) is kept
