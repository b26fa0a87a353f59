"""k-quants without the engine: what is asked of it, and what happens where it is missing, refuses or leaves floats."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import moekit
from moekit.checkpoint.folder import Checkpoint
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.exporting import gguf_kquants
from moekit.exporting.gguf_file import prepare
from tests.checkpoints import plain
from tests.exporting import rounded

pytest.importorskip("gguf", reason="gguf is not installed")

# An engine that does as told below; its version of the settings has the same names as the real one.
ENGINE = """
import ctypes, shutil
LLAMA_FTYPE_MOSTLY_Q4_K_M = 15
GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 = 2, 8
class llama_model_tensor_override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]
class Settings:
    ftype = nthread = 0
    tt_overrides = None
def llama_model_quantize_default_params():
    return Settings()
def llama_model_quantize(source, target, settings):
    {body}
"""


def engine(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    folder.mkdir()
    (folder / "llama_cpp.py").write_text(ENGINE.format(body=body))
    monkeypatch.syspath_prepend(str(folder))


def test_without_the_engine_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else found(name))
    with pytest.raises(UnsupportedModel, match=r"llama-cpp-python is not installed") as refused:
        moekit.export(plain(tmp_path / "source", "qwen3_moe"), to="gguf", tensor_type="q4_k_m", out=tmp_path / "out")
    assert "moekit[engines]" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_kquants, "check_installed", lambda: None)
    bits = {"gate": 2, "up": 4, "down": 6}
    source = Checkpoint.open(rounded(tmp_path / "rounded", "qwen3_moe", lambda layer, part, expert: bits[part]))
    kept = prepare(source, "q4_k_m").overrides
    assert [kept[f"blk.1.ffn_{part}_exps.weight"] for part in bits] == ["Q4_0", "Q4_0", "Q8_0"], "as they lie"
    again = prepare(source, "q4_k_m", round_again=True).overrides
    assert [again[f"blk.1.ffn_{part}_exps.weight"] for part in bits] == ["Q2_K", "Q4_K", "Q6_K"]
    assert prepare(source, "bf16").overrides == {}
    plainly = Checkpoint.open(plain(tmp_path / "wide", "qwen3_moe", hidden_size=64, moe_intermediate_size=64))
    assert prepare(plainly, "q4_k_m").overrides == {}, "the mixture is the engine's"
    with pytest.raises(BadConfig, match=r"layer 0: rows of blk\.0\.ffn_down_exps\.weight hold 24 numbers"):
        prepare(Checkpoint.open(plain(tmp_path / "narrow", "qwen3_moe")), "q4_k_m")
    with pytest.raises(BadConfig, match="round_again is for k-quants"):
        moekit.export(source.path, to="gguf", round_again=True, out=tmp_path / "out")


def test_a_refusal_of_the_engine_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = plain(tmp_path / "source", "qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    given: dict[str, Any] = {"to": "gguf", "tensor_type": "q4_k_m", "out": tmp_path / "out"}
    engine(tmp_path / "refusing", monkeypatch, "return 1")
    with pytest.raises(UnsupportedModel, match="llama_model_quantize answered 1"):
        moekit.export(source, **given)
    engine(tmp_path / "dying", monkeypatch, "import os, sys; sys.stderr.write('no such tensor\\n'); os._exit(6)")
    with pytest.raises(UnsupportedModel, match=r"did not round the file to q4_k_m: .*no such tensor"):
        moekit.export(source, **given)
    assert not (tmp_path / "out").exists()


def test_experts_that_are_left_in_floats_or_changed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = "assert settings.ftype == 15; shutil.copyfile(source, target); return 0"
    engine(tmp_path / "copying", monkeypatch, copying)
    source = plain(tmp_path / "source", "qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    with pytest.raises(NumericFault, match=r"layer 0: blk\.0\.ffn_gate_exps\.weight is left in F32"):
        moekit.export(source, to="gguf", tensor_type="q4_k_m", out=tmp_path / "out")
    exact = rounded(tmp_path / "rounded", "qwen3_moe", 4)
    made = moekit.export(exact, to="gguf", tensor_type="q4_k_m", out=tmp_path / "out")
    assert made.matrices == {"Q4_0": 6}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.gguf"]
    with pytest.raises(NumericFault, match=r"held rounded experts exactly in Q8_0, and llama\.cpp made Q4_0"):
        gguf_kquants.quantize(
            tmp_path / "out" / "model.gguf", tmp_path / "again.gguf", "q4_k_m", {"blk.0.ffn_up_exps.weight": "Q8_0"}
        )
