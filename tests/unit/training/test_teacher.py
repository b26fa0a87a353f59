"""A teacher is asked or read from disk; a store goes on after a kill and fits one text and one teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.routing.methods.naee_skip import NAEESkip
from moekit.runtime import attach
from moekit.training import LiveTeacher, StoredTeacher, TrainConfig, store_teacher, train
from moekit.training.batch import MicroBatch
from tests.families import VOCAB, build, logits
from tests.unit.training.test_run import text

ROWS = text(rows=10, padded=True)


def config(**changes: object) -> TrainConfig:
    base = {"steps": 2, "batch": 2, "seq_len": 16, "lr": 1e-2, "save_every": None, "precision": "fp32", "warmup": 0}
    return TrainConfig(**base | {"objectives": {"ce": 0, "kd": 1.0}} | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "teacher"
    store_teacher(build("qwen2_moe", seed=7), ROWS, folder, top_k=VOCAB, shard_rows=4)
    return folder


def test_the_first_loss_is_the_divergence_written_out(store: Path) -> None:
    student, teacher = build("qwen2_moe"), build("qwen2_moe", seed=7)
    batch = [ROWS[i] for i in range(len(ROWS))]
    ids_RS = torch.stack([row["input_ids"] for row in batch])
    counted_RS = torch.stack([row["labels"] for row in batch])[:, 1:] != -100
    p, q = (logits(m, ids_RS).double().log_softmax(-1)[:, :-1] for m in (teacher, student))
    expected = float(((p.exp() * (p - q)).sum(-1) * counted_RS).sum() / counted_RS.sum())
    for known in (LiveTeacher(teacher), StoredTeacher(store)):
        result = train(build("qwen2_moe"), None, ROWS, config(steps=1, batch=len(ROWS)), teacher=known)
        assert result.losses[0] == pytest.approx(expected, rel=1e-3)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    student = build("olmoe")
    result = train(student, None, ROWS, config(steps=1), teacher=LiveTeacher(build("olmoe")))
    assert student.config.use_cache  # as it came, though training has no use for one
    assert result.losses[0] == pytest.approx(0, abs=1e-6)
    assert result.history[0]["grad_norm"] == pytest.approx(0, abs=1e-4)


def test_a_killed_store_goes_on_and_ends_alike(store: Path, tmp_path: Path) -> None:
    model, again = build("qwen2_moe", seed=7), tmp_path / "again"
    store_teacher(model, ROWS, again, top_k=VOCAB, shard_rows=4)
    (again / "top-00001.safetensors").unlink()
    (again / ".top-00001.safetensors.part").write_bytes(b"half")
    with pytest.raises(BadData, match="missing or damaged"):
        StoredTeacher(again)
    untouched = (again / "top-00000.safetensors").stat().st_mtime_ns
    store_teacher(model, ROWS, again, top_k=VOCAB, shard_rows=4)
    assert (again / "top-00000.safetensors").stat().st_mtime_ns == untouched
    for number in range(3):
        name = f"top-{number:05d}.safetensors"
        assert (again / name).read_bytes() == (store / name).read_bytes()


def test_a_store_fits_its_text_its_teacher_and_temperature_one(store: Path, tmp_path: Path) -> None:
    known = StoredTeacher(store)
    with pytest.raises(BadConfig, match="another text"):
        train(build("qwen2_moe"), None, text(rows=10, seed=3), config(), teacher=known)
    with pytest.raises(BadConfig, match="temperature"):
        train(build("qwen2_moe"), None, ROWS, config(objectives={"kd": {"temperature": 2.0}}), teacher=known)
    with pytest.raises(BadConfig, match="another store"):
        store_teacher(build("qwen2_moe", seed=8), ROWS, store, top_k=VOCAB, shard_rows=4)
    with pytest.raises(BadConfig, match="no objective asks"):
        train(build("qwen2_moe"), None, ROWS, config(objectives={}), teacher=known)
    with pytest.raises(BadConfig, match="needs a teacher"):
        train(build("qwen2_moe"), None, ROWS, config())


def test_damaged_entries_are_refused(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    store_teacher(build("qwen2_moe", seed=7), ROWS, folder, top_k=2)
    header = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps({**header, "top_k": 3}))
    with pytest.raises(BadData, match="does not hold"):
        StoredTeacher(folder)
    (folder / "teacher.json").write_text(json.dumps({**header, "vocabulary": 5}))
    with pytest.raises(BadData, match="outside the vocabulary"):
        StoredTeacher(folder).output(MicroBatch(ROWS.input_ids[:1].long()), torch.tensor([0]))


def test_a_store_is_of_a_model_with_its_policy(store: Path) -> None:
    same = build("qwen2_moe", seed=7)
    assert LiveTeacher(same).identity == StoredTeacher(store).header.teacher
    attach(same, NAEESkip(beta=0.5))
    with pytest.raises(BadConfig, match="another store"):
        store_teacher(same, ROWS, store, top_k=VOCAB, shard_rows=4)
