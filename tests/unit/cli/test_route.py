"""`moekit route`: what it refuses."""

from __future__ import annotations

from pathlib import Path

from moekit.checkpoint import Checkpoint
from moekit.placement import Placement
from tests.commands import Moekit
from tests.families import EXPERTS
from tests.tiny import write_model


def test_a_placement_of_another_model_is_refused(moekit: Moekit, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    layers = {0: [0, 1] * (EXPERTS // 2), 1: [1, 0] * (EXPERTS // 2)}
    for name, fingerprint in (("own", Checkpoint.open(model).fingerprint), ("other", "0" * 64)):
        placement = Placement(
            fingerprint=fingerprint,
            devices=2,
            experts=EXPERTS,
            layers=layers,
            objective={0: 0.5, 1: 0.5},
            solver="by-hand",
        )
        placement.save(tmp_path / f"{name}.json")
    options = ("route", "c2r", model)
    own = moekit(*options, "-o", tmp_path / "a", "--mode", "device", "--placement", tmp_path / "own.json")
    assert own.code == 0, own.err
    other = moekit(*options, "-o", tmp_path / "b", "--mode", "device", "--placement", tmp_path / "other.json")
    assert other.code == 2
    assert other.says("placement was made for model 000000000000")
    assert not (tmp_path / "b").exists()
