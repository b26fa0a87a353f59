import json

import pytest
from pydantic import ValidationError

import moekit
from moekit.checkpoint.parts import PartEntry
from moekit.checkpoint.record import FORMAT, RECORD_FILE, Expectations, Record, TensorExpectation
from moekit.errors import BadCheckpoint, UnsafeInput

FULL = Record(
    command="moekit route c2r",
    parent="org/model",
    parent_fingerprint="ab",
    seed=1,
    plan_hash="cd",
    config={"top_t": 4},
    scores={"0": [0.5, 0.25]},
    parts=[PartEntry(kind="routing", name="c2r", config={"top_t": 4}, layers=[0, 3])],
    expectations=Expectations(
        experts={0: 8, 3: 4}, top_k=2, tensors={"a": TensorExpectation(dtype="F32", shape=[2], sha256="00")}
    ),
)


def test_round_trip(tmp_path):
    FULL.write(tmp_path)
    assert Record.read(tmp_path) == FULL
    assert FULL.moekit == moekit.__version__
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]


def test_no_record(tmp_path):
    assert Record.read(tmp_path) is None


def test_records_are_frozen_and_refuse_unknown_keys(tmp_path):
    with pytest.raises(ValidationError):
        FULL.seed = 2
    FULL.write(tmp_path)
    value = json.loads((tmp_path / RECORD_FILE).read_text())
    (tmp_path / RECORD_FILE).write_text(json.dumps({**value, "surprise": 1}))
    with pytest.raises(BadCheckpoint, match="surprise"):
        Record.read(tmp_path)


def test_a_newer_format_is_told_apart_from_damage(tmp_path):
    (tmp_path / RECORD_FILE).write_text(json.dumps({"format": FORMAT + 1, "moekit": "9.9", "novelty": {}}))
    with pytest.raises(BadCheckpoint, match=r"moekit 9\.9 .* newer format"):
        Record.read(tmp_path)


def test_damage(tmp_path):
    (tmp_path / RECORD_FILE).write_text('{"format": 1')
    with pytest.raises(BadCheckpoint, match="not valid JSON"):
        Record.read(tmp_path)
    (tmp_path / RECORD_FILE).write_text("{}")
    with pytest.raises(BadCheckpoint, match="command"):
        Record.read(tmp_path)


def test_a_record_that_is_a_link_elsewhere(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    FULL.write(tmp_path)
    (folder / RECORD_FILE).symlink_to(tmp_path / RECORD_FILE)
    with pytest.raises(UnsafeInput):
        Record.read(folder)
