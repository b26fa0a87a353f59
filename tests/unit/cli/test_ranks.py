"""`moekit train` as two ranks: one model is written, and it is the one that a single process trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moekit
from tests.processes import ranks
from tests.tiny import write_model, write_text


def launch(folder: Path, world: int, *args: str) -> str:
    done = ranks(["-m", "moekit", *args], world, cwd=folder)
    assert not any(rank.returncode for rank in done), [rank.stderr[-3000:] for rank in done]
    return "".join(rank.stdout for rank in done)


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    write_model(tmp_path / "moe")
    write_text(tmp_path / "text")
    options = ("--data", "text", "--steps", "3", "--seq-len", "32", "--batch", "2", "--lr", "1e-2")
    launch(tmp_path, 1, "train", "moe", "-o", "one", *options, "--accumulation", "2")
    told = launch(tmp_path, 2, "train", "moe", "-o", "two", *options)
    assert told.count("wrote two") == 1
    one, two = (moekit.load(tmp_path / name, device="cpu").state_dict() for name in ("one", "two"))
    start = moekit.load(tmp_path / "moe", device="cpu").state_dict()
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 5e-3
    assert not list(tmp_path.glob(".two.scratch*"))


@pytest.mark.slow
def test_two_ranks_measure_and_keep_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "moe")
    write_text(tmp_path / "text")
    told = launch(tmp_path, 2, "evaluate", "moe", "--data", "text", "--max-tokens", "200", "--ep", "2")
    assert told.count("perplexity of moe") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"moe", "text"}
