"""Widths that a folder of 16-bit weights can have and still be run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moekit
from moekit.errors import BadConfig
from tests.families import WIDTH, build, logits
from tests.tiny import tokenizer

PLAIN = {"method": "magnitude", "proof": False, "device": "cpu"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "moe"
    build("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_rows_of_16_bit_weights_stay_whole_for_grouped_kernels(moe: Path, tmp_path: Path) -> None:
    made = moekit.slim(moe, width="1/2", settings={"repair": "none"}, out=tmp_path / "half", **PLAIN)
    # Half is 12, and rows of 12 numbers of 2 bytes are no whole 16 bytes: 16 is next.
    assert (WIDTH, made.width["after"]) == (24, 16)
    model = moekit.load(tmp_path / "half", dtype="bfloat16", device="cpu")
    model.set_experts_implementation("grouped_mm")
    assert bool(logits(model).isfinite().all())


def test_others_are_refused_before_work(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no whole 16 bytes") as refused:
        moekit.slim(moe, width=12, settings={"repair": "none", "multiple": 1}, out=tmp_path / "odd", **PLAIN)
    assert "multiple=8" in str(refused.value)
    assert not (tmp_path / "odd").exists()
