"""`moekit place --replay` takes a trace of the model that was placed for, or of one made from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moekit
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import ancestors
from moekit.cli.main import main
from moekit.errors import BadData
from moekit.trace import Recorder, Trace
from tests.checkpoints import saved
from tests.families import VOCAB
from tests.odd_folders import nudge
from tests.unit.placement.samples import trace_of

CHOSEN = {layer: torch.arange(64 * 2).view(64, 2) % 8 for layer in (0, 1)}


def folder_of(path: Path, fingerprint: str, made_from: tuple[str, ...] = ()) -> Path:
    trace = trace_of(CHOSEN, 8, fingerprint=fingerprint)
    trace.meta = trace.meta.model_copy(update={"model": f"models/{fingerprint}", "ancestors": list(made_from)})
    trace.save(path)
    return path


def place(*args: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["place", "swap", *map(str, args)])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_a_trace_of_another_model_is_refused_by_name(tmp_path, capsys):
    planned, other = folder_of(tmp_path / "planned", "base-model"), folder_of(tmp_path / "other", "stranger")
    assert place(planned, "-o", tmp_path / "out", "--devices", 2, "--replay", other) == 2
    told = capsys.readouterr().err
    assert "models/stranger (stranger)" in told
    assert "models/base-model (base-model)" in told
    assert not (tmp_path / "out").exists()
    assert place(planned, "-o", tmp_path / "out", "--devices", 2, "--replay", other, "--other-weights") == 0


def test_a_trace_of_a_model_made_from_it_is_taken(tmp_path):
    planned = folder_of(tmp_path / "planned", "base-model")
    tuned = folder_of(tmp_path / "tuned", "tuned-twice", ("tuned-once", "base-model"))
    assert place(planned, "-o", tmp_path / "out", "--devices", 2, "--replay", tuned) == 0
    with pytest.raises(BadData, match="tuned-twice"):
        Trace.load(planned).check_descent(Trace.load(tuned))


def test_a_recorded_trace_knows_what_its_model_was_made_from(tmp_path):
    first = saved(tmp_path / "first")
    model = moekit.load(first, device="cpu")
    nudge(model)
    moekit.save(model, tmp_path / "second")
    model = moekit.load(tmp_path / "second", device="cpu")
    nudge(model)
    moekit.save(model, tmp_path / "third")
    prints = [Checkpoint.open(tmp_path / name).fingerprint for name in ("second", "first")]
    assert ancestors(Checkpoint.open(tmp_path / "third").record) == prints
    model = moekit.load(tmp_path / "third", device="cpu")
    with Recorder(model) as recorder:
        model(input_ids=torch.arange(3, 30)[None] % VOCAB)
    assert recorder.trace().meta.ancestors == prints
