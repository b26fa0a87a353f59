"""`moekit train` under torchrun: one model is written, and it is the one that a single process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import moekit
from tests.tiny import write_model, write_text

ROOT = Path(__file__).resolve().parents[3]


def launch(folder: Path, launcher: list[str], *args: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "moekit", *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    write_model(tmp_path / "moe")
    write_text(tmp_path / "text")
    options = ("--text", "text", "--steps", "3", "--seq-len", "32", "--batch", "2", "--lr", "1e-2")
    launch(tmp_path, [], "train", "moe", "one", *options, "--accumulation", "2")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = launch(tmp_path, torchrun, "train", "moe", "two", *options)
    assert told.count("wrote two") == 1
    one, two = (moekit.load(tmp_path / name, device="cpu").state_dict() for name in ("one", "two"))
    start = moekit.load(tmp_path / "moe", device="cpu").state_dict()
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 5e-3
    assert not list(tmp_path.glob(".two.scratch*"))
