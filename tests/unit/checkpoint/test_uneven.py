"""Layers that hold different numbers of experts: opened by moekit, proven, refused by stock transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit
from moekit.anatomy import find_moe_layers
from moekit.checking import check
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.apply import apply
from moekit.compress.decision import LayerDecision
from moekit.compress.live import change_model
from moekit.errors import BadCheckpoint, BadConfig
from tests.checkpoints import edit_json, plain
from tests.families import FAMILIES, build, logits


def decisions(family: str) -> dict[int, LayerDecision]:
    indices = [layer.index for layer in find_moe_layers(build(family))]
    kept = [(0, 2, 5), (1, 2, 3, 4, 6, 7)]
    return {index: LayerDecision(keep=kept[number % 2]) for number, index in enumerate(indices)}


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_disk_engine_writes_unevenly_moekit_loads(family: str, fused: bool, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family, fused=fused))
    apply(checkpoint, decisions(family), tmp_path / "out", record=Record(command="a test"))
    expected = logits(change_model(build(family), decisions(family)))
    loaded = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert {layer.index: layer.geometry.experts for layer in find_moe_layers(loaded)} == {
        index: len(decision.keep) for index, decision in decisions(family).items()
    }
    report = check(tmp_path / "out")
    assert report.ok, report
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_live_uneven_model_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    changed = change_model(build(family), decisions(family))
    moekit.save(changed, tmp_path / "out")
    loaded = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(loaded), logits(changed), rtol=1e-5, atol=1e-5)
    assert check(tmp_path / "out").ok
    assert "does not" in (tmp_path / "out" / "README.md").read_text()
    again = copy.deepcopy(loaded)
    moekit.save(again, tmp_path / "twice")
    assert check(tmp_path / "twice").ok


def test_without_its_record_an_uneven_folder_is_refused(tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), decisions("mixtral")), tmp_path / "out")
    (tmp_path / "out" / "moekit.json").unlink()
    with pytest.raises(BadCheckpoint, match="missing"):
        moekit.load(tmp_path / "out")


def test_a_record_of_other_counts_is_refused(tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), decisions("mixtral")), tmp_path / "out")

    def change(record: dict[str, dict[str, dict[str, int]]]) -> None:
        record["expectations"]["experts"]["0"] = 4

    edit_json(tmp_path / "out" / "moekit.json", change)
    with pytest.raises(BadCheckpoint):
        moekit.load(tmp_path / "out")


def test_a_device_map_is_refused_with_the_reason(tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), decisions("mixtral")), tmp_path / "out")
    with pytest.raises(BadConfig, match="device_map"):
        moekit.load(tmp_path / "out", device_map="auto")
