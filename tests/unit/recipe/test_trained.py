"""Two models are called trained alike only where their records say so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moekit.checkpoint import Record
from moekit.jobs.shared.trained import trained_alike

SCORES = {"steps": 10, "tokens": 5120, "precision": "fp32", "trained": {"router": 96}, "losses": [3.0, 2.5]}
SETTINGS = {"tokens": 5120, "lr": 1e-3, "data": "train.jsonl"}


def traced(folder: Path, *, model: str = "", **changes: Any) -> Any:
    told = {"seed": 1, "parent_fingerprint": "start", "config": SETTINGS, "scores": SCORES, "fingerprint": "f"}
    folder.mkdir()
    Record(command="moekit train", **(told | changes)).write(folder)
    return SimpleNamespace(model=model or str(folder), fingerprint="f")


def test_what_differs_in_routing_alone_was_trained_alike(tmp_path: Path) -> None:
    one, other = traced(tmp_path / "one"), traced(tmp_path / "other", plan_hash="c2r")
    assert trained_alike(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": SETTINGS | {"lr": 1e-4}},
        {"config": SETTINGS | {"data": "other.jsonl"}},
        {"seed": 2},
        {"parent_fingerprint": "another"},
        {"scores": SCORES | {"precision": "bf16"}},
        {"scores": SCORES | {"steps": 9}},
        {"scores": {}},
        {"fingerprint": "changed since"},
        {"model": "/nowhere"},
        {"model": "olmoe"},
    ],
    ids=str,
)
def test_anything_else_was_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    other = traced(tmp_path / "other", **changes)
    assert not trained_alike(traced(tmp_path / "one"), other)
    assert not trained_alike(other, traced(tmp_path / "again"))


def test_what_was_never_trained_was_not_trained_alike(tmp_path: Path) -> None:
    one, other = traced(tmp_path / "one", scores={}), traced(tmp_path / "other", scores={})
    assert not trained_alike(one, other)
    assert not trained_alike(one, SimpleNamespace(model="", fingerprint=""))
