"""kill -9 at random moments of every command that makes a model smaller: nothing half-written, resumed it is equal."""

from __future__ import annotations

import json
import random
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moekit
from tests.processes import Running
from tests.tiny import write_model, write_text

KILLS = 4
# What tells when and where a run was, not what it did.
MOVING = ("command", "seconds", "parent", "teacher", "resumed_from", "out", "time")

TEXT = ("--data", "text", "--max-tokens", 600, "--seq-len", 64, "--batch-size", 1)
PROVED = (*TEXT, "--proof-tokens", 300)
FEW = ("--choices", 8, "--tries", 2, "--random-plans", 1, *PROVED)
HEALED = ("--steps", 6, "--save-every", 1, "--seq-len", 32, "--batch", 2, "--lr", 0.01, "--precision", "fp32")
LESSON = "{steps: 3, seq_len: 32, batch: 2, save_every: 1}"
COMMANDS: dict[str, tuple[Any, ...]] = {
    "prune": ("prune", "moe", "--method", "reap", "--keep", 0.5, *PROVED),
    "prune repaired": ("prune", "moe", "--method", "reap", "--keep", 0.5, "--repair", "least-squares", *PROVED),
    "prune mone": ("prune", "moe", "--method", "mone", "--keep", 0.5, *PROVED),
    "prune dern": ("prune", "moe", "--method", "dern", "--keep", 0.5, *PROVED),
    "merge hc-smoe": ("merge", "moe", "--method", "hc-smoe", "--keep", 0.5, *PROVED),
    "merge ream": ("merge", "moe", "--method", "ream", "--keep", 0.5, *PROVED),
    "quantize gptq": ("quantize", "moe", "--method", "gptq", "--bits", 3, "--set", "group=8", *PROVED),
    "quantize pmq": ("quantize", "moe", "--method", "rtn", "--mean-bits", 2.5, "--set", "group=8", *PROVED),
    "slim": ("slim", "moe", "--method", "slimmoe", "--width", 16, "--set", "multiple=8", *PROVED),
    "sparsify": ("sparsify", "moe", "--method", "wanda", "--sparsity", 0.5, *PROVED),
    "heal": ("heal", "half", "--teacher", "moe", "--data", "text", *HEALED, "--proof-tokens", 300),
    "fit": ("fit", "moe", "--bytes", 300_000, "--heal", "router", "--heal-settings", LESSON, *FEW),
    "export packed": ("export", "rounded", "--to", "packed"),
    "export": ("export", "rounded", "--to", "compressed-tensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe", num_hidden_layers=4, moe_intermediate_size=32)
    write_text(folder / "text", documents=20)
    common: dict[str, Any] = {"proof": False, "progress": False}
    moekit.prune(folder / "moe", method="random", keep=0.5, out=folder / "half", **common)
    symmetric = {"group": 8, "symmetric": True}
    moekit.quantize(folder / "moe", method="rtn", bits=4, settings=symmetric, out=folder / "rounded", **common)
    return folder


def told(folder: Path) -> Any:
    """The record without what moves."""

    def still(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: still(part) for key, part in value.items() if key not in MOVING}
        return [still(part) for part in value] if isinstance(value, list) else value

    return still(json.loads((folder / "moekit.json").read_text())) if (folder / "moekit.json").exists() else None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    assert told(a) == told(b)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_again_and_again(name: str, made: Path, tmp_path: Path) -> None:
    words = ["-m", "moekit", *COMMANDS[name]]
    whole, out = tmp_path / "whole" / "made", tmp_path / "killed" / "made"
    start = time.monotonic()
    done = Running([*words, "-o", whole], cwd=made).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    lasts = time.monotonic() - start
    draw = random.Random(zlib.crc32(name.encode()))
    for _ in range(KILLS):
        running = Running([*words, "-o", out], cwd=made)
        time.sleep(draw.uniform(0.1, 0.95) * lasts)
        running.kill()
        if out.exists():
            break
    if not out.exists():
        done = Running([*words, "-o", out], cwd=made).wait()
        assert done.returncode == 0, done.stderr[-3000:]
    same(whole, out)
    left = sorted(file.name for file in out.parent.iterdir() if not file.name.startswith("."))
    assert left == sorted(file.name for file in whole.parent.iterdir() if not file.name.startswith("."))
